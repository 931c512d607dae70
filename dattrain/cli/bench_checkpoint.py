"""``dattrain bench checkpoint``: what a save costs the step loop, and how near to the disk's own speed it writes and reads."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from dattrain.cli.bench_output import add_output_arguments, emit
from dattrain.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subverb."""
    parser.add_argument(
        "--parameters",
        type=float,
        default=200e6,
        metavar="N",
        help="of the model (default 200e6; 12 bytes each are saved)",
    )
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="local ranks that save (default 2)")
    parser.add_argument(
        "--load-ranks",
        type=int,
        nargs="*",
        default=[2, 4],
        metavar="N",
        help="local ranks that load (default 2 4)",
    )
    parser.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=2, help="ZeRO stage (default 2)")
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="where to write, on the disk to be measured; needs 3x the state",
    )
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, report; returns 0, also where a bar is missed (the report says so)."""
    if args.parameters < 1e5 or args.ranks < 1 or any(n < 1 for n in args.load_ranks):
        raise UserError("--parameters must be at least 1e5, --ranks and --load-ranks at least 1", exit_code=2)
    if not args.dir.is_dir():
        raise UserError(f"--dir {args.dir} is no folder", exit_code=2)
    needed = int(args.parameters * 12 * 3.2)
    free = shutil.disk_usage(args.dir).free
    if free < needed:
        raise UserError(f"--dir {args.dir} has {free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB are needed")
    from dattrain.bench import checkpoint

    report = checkpoint.bench(
        args.dir,
        parameters=int(args.parameters),
        ranks=args.ranks,
        load_ranks=args.load_ranks,
        stage=args.stage,
        rounds=args.rounds,
    )
    emit(report, args)
    return 0
