"""``dattrain bench step``: a whole update of a recipe, in turns with the same update changed in one setting; then taken apart."""

from __future__ import annotations

import argparse

from dattrain.bench.defaults import VARY
from dattrain.cli.arguments import positive
from dattrain.cli.bench_output import add_output_arguments, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Recipe, what to vary, conditions, outputs."""
    parser.add_argument(
        "recipe",
        nargs="*",
        metavar="CONFIG key=value",
        help="a recipe or a run folder, and changes to it (dat_tiny at 224 px, micro-batch 4, bf16, ZeRO-2)",
    )
    parser.add_argument(
        "--vary",
        action="append",
        metavar="KEY=V,V",
        help=f"a setting and its values, one contender for each; repeat for more ({' '.join(VARY)})",
    )
    parser.add_argument(
        "--accumulation", type=positive, default=1, metavar="N", help="micro-batches of an update (1)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=positive, default=0, help="CPU threads (default: the recipe's)")
    add_output_arguments(parser)
    parser.set_defaults(rounds=5)


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; 0."""
    from dattrain.bench import step
    from dattrain.bench.attention import pick_device

    report = step.bench(
        step.read(args.recipe, args.accumulation),
        args.vary or VARY,
        device=pick_device(args.device),
        rounds=args.rounds,
        threads=args.threads,
    )
    emit(report, args)
    return 0
