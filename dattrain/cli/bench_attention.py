"""``dattrain bench attention``: the deformable core, every backend against the straightforward formulation."""

from __future__ import annotations

import argparse

from dattrain.bench.defaults import DTYPES
from dattrain.cli.arguments import positive
from dattrain.cli.bench_output import add_output_arguments, emit
from dattrain.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes default to the third stage at 224 and 384 pixels."""
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[14, 24], metavar="N", help="sides of the map (14 24)"
    )
    parser.add_argument(
        "--batch",
        type=positive,
        nargs="+",
        metavar="B",
        help="images, per size (8 2 on a CPU, 128 32 on CUDA)",
    )
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--dim", type=int, default=32, help="channels of a head")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--grids", nargs="+", choices=("center", "corner"), default=["center", "corner"])
    parser.add_argument("--passes", nargs="+", choices=("forward", "both"), default=["forward", "both"])
    parser.add_argument(
        "--backends", nargs="+", help="of dattrain.ops (default: all that run here but the reference)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="add the straightforward formulation under torch.compile"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's choice)")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; 0."""
    import torch

    from dattrain.bench import attention

    if args.batch and len(args.batch) not in (1, len(args.sizes)):
        raise UserError(
            f"--batch has {len(args.batch)} values for {len(args.sizes)} sizes; give one, or one per size"
        )
    if args.threads:
        torch.set_num_threads(args.threads)
    report = attention.bench(
        sizes=args.sizes,
        batches=args.batch,
        heads=args.heads,
        groups=args.groups,
        dim=args.dim,
        dtypes=args.dtypes,
        grids=args.grids,
        passes=args.passes,
        backends=args.backends,
        compile=args.compile,
        device=attention.pick_device(args.device),
        rounds=args.rounds,
    )
    emit(report, args)
    return 0
