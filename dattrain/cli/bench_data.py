"""``dattrain bench data``: the input pipeline against torchvision's, timm's, webdataset's and DALI, on the same images."""

from __future__ import annotations

import argparse
from pathlib import Path

from dattrain.cli.arguments import positive
from dattrain.cli.bench_output import add_output_arguments, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subverb."""
    given = parser.add_mutually_exclusive_group()
    given.add_argument(
        "--images", type=Path, metavar="DIR", help="image folder to measure on, DIR/<class>/<image>"
    )
    given.add_argument("--shards", metavar="PATTERN", help="indexed tar shards to measure on")
    parser.add_argument(
        "--count",
        type=positive,
        default=2048,
        metavar="N",
        help="images per turn (default 2048); made if none are given",
    )
    parser.add_argument(
        "--workers", type=positive, default=2, metavar="N", help="worker processes (default 2)"
    )
    parser.add_argument("--batch", type=positive, default=64, metavar="N", help="micro-batch (default 64)")
    parser.add_argument(
        "--size", type=positive, default=224, metavar="PX", help="side of the output (default 224)"
    )
    parser.add_argument(
        "--model", default="dat_tiny", metavar="NAME", help="of the training step (default dat_tiny)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=6,
        metavar="N",
        help="training steps for the share of waiting; 0: none (default 6)",
    )
    parser.add_argument(
        "--device",
        default=None,
        metavar="NAME",
        help="of DALI and of the training step (default: cuda, else cpu)",
    )
    add_output_arguments(parser)
    parser.set_defaults(rounds=5)


def run(args: argparse.Namespace) -> int:
    """Run the bench; returns 0 whether or not the bars are met."""
    import torch

    from dattrain.bench import data
    from dattrain.bench.attention import pick_device

    torch.set_num_threads(1)
    report = data.bench(
        folder=args.images,
        shards=args.shards,
        count=args.count,
        workers=args.workers,
        batch=args.batch,
        size=args.size,
        model=args.model,
        steps=args.steps,
        device=pick_device(args.device or "auto"),
        rounds=args.rounds,
    )
    emit(report, args)
    return 0
