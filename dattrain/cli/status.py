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
    """Exit code 0; 1 where a run has failed or crashed."""
    import json
    from dataclasses import asdict

    from dattrain.submit import local, queue, run_folders, run_status

    folders = run_folders.find(args.runs or ["runs"])
    if args.all:
        folders = list(dict.fromkeys([*run_folders.find(["runs"]), *folders]))
    states = queue.states(job for folder in folders for job in run_status.jobs_of(folder))
    statuses = [run_status.status_of(folder, states, local_alive=local.alive(folder)) for folder in folders]
    if args.json:
        for status in statuses:
            print(json.dumps({**asdict(status), "run": str(status.run)}))
    else:
        print(run_status.render(statuses))
    return 1 if any(status.state in ("failed", "crashed") for status in statuses) else 0
