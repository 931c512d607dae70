"""``dattrain submit``: a recipe, a chain or a run folder into the queue."""

from __future__ import annotations

import argparse

from dattrain.cli.arguments import positive_number
from dattrain.cli.run_argument import run_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "config", metavar="CONFIG|CHAIN|RUN", help="a recipe, a chain of them, or a run to continue"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="in a chain: stage.key=value")
    parser.add_argument(
        "--cluster", default="generic", metavar="NAME", help="profile: a name or a file (generic)"
    )
    parser.add_argument(
        "--nodes", default="1", metavar="N[-M]", help="nodes of a job; a range takes what is free (1)"
    )
    parser.add_argument("--gpus-per-node", type=int, metavar="G", help="instead of the profile's")
    parser.add_argument("--partition", metavar="P", help="instead of the profile's")
    parser.add_argument("--time", metavar="T", help="limit of one job, D-HH:MM:SS; instead of the profile's")
    parser.add_argument("--retries", type=int, default=3, metavar="R", help="crashes that are forgiven (3)")
    parser.add_argument("--after", metavar="JOB|RUN", help="start once that one has ended well")
    parser.add_argument(
        "--array", nargs="+", action="extend", default=[], metavar="key=v1,v2,…",
        help="one run for each combination of values, as one job array",
    )  # fmt: skip
    parser.add_argument(
        "--array-parallel", type=int, metavar="N", help="most runs of the array at a time (all)"
    )
    parser.add_argument(
        "--run",
        dest="folder",
        metavar="DIR",
        type=run_folder,
        help="run folder (runs/NAME; of an array or a chain: their parent)",
    )
    parser.add_argument(
        "--images-per-second", type=positive_number, metavar="X",
        help="of the whole job, measured or expected: checks that a step and a save fit into the time limit",
    )  # fmt: skip
    parser.add_argument(
        "--yes", action="store_true", help="submit also what would take weeks or years on CPUs alone"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan and the batch scripts; touch nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when all is in the queue."""
    from dattrain.submit.plan import SubmitRequest
    from dattrain.submit.submission import submit

    return submit(
        SubmitRequest(
            config=args.config,
            overrides=tuple(args.overrides),
            cluster=args.cluster,
            nodes=args.nodes,
            gpus_per_node=args.gpus_per_node,
            partition=args.partition,
            time=args.time,
            retries=args.retries,
            after=args.after,
            array=tuple(args.array),
            array_parallel=args.array_parallel,
            folder=args.folder,
            images_per_second=args.images_per_second,
            dry_run=args.dry_run,
            yes=args.yes,
        )
    )
