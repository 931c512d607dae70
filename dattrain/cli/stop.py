"""``dattrain stop``: have a run save at the next step boundary and end, by a file in its folder; no Slurm is needed."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, chain or array")


def run(args: argparse.Namespace) -> int:
    """Exit code 0."""
    from dattrain.submit import run_folders

    for folder in run_folders.find(args.runs):
        (folder / "stop").touch()
        print(
            f"{folder}: will save and stop; continue with: dattrain submit {folder}  (or dattrain train {folder})"
        )
    return 0
