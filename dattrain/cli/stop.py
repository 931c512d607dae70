"""``dattrain stop``: have a run save at the next step boundary and end, by a file in its folder; no Slurm is needed."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, chain or array")


def run(args: argparse.Namespace) -> int:
    """Exit code 0."""
    from shlex import quote

    from dattrain.submit import run_folders
    from dattrain.submit.history import history

    for folder in run_folders.find(args.runs):
        (folder / "stop").touch()
        jobs = [str(event["job"]) for event in history(folder) if event.get("job")]
        verb = "submit" if jobs else "train"
        where = " --cluster local" if jobs and jobs[-1].startswith("local") else ""
        print(f"{folder}: will save and stop; it goes on with: dattrain {verb} {quote(str(folder))}{where}")
    return 0
