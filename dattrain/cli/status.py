"""``dattrain status``: state, speed, and why a run was restarted."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="run folder, chain or array; without one, all in runs/"
    )
    parser.add_argument("--all", action="store_true", help="all runs in runs/")
    parser.add_argument("--json", action="store_true", help="one JSON object per run and line")


def run(args: argparse.Namespace) -> int:
    """Exit code 0; 1 where a run has failed."""
    import json
    from dataclasses import asdict

    from dattrain.submit import local, queue, request, run_status

    folders = request.folders_of(args.runs or ["runs"])
    if args.all:
        folders = list(dict.fromkeys([*request.folders_of(["runs"]), *folders]))
    states = queue.states(job for folder in folders for job in run_status.jobs_of(folder))
    reports = [run_status.report(folder, states, local_alive=local.alive(folder)) for folder in folders]
    if args.json:
        for one in reports:
            print(json.dumps({**asdict(one), "run": str(one.run)}))
    else:
        print(run_status.render(reports))
    return 1 if any(one.state == "failed" for one in reports) else 0
