"""``dattrain finetune WEIGHTS --data FOLDER``: weights trained further on one's own images, with a head for their classes."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    from dattrain.cli import own_images, train

    parser.add_argument(
        "weights",
        metavar="WEIGHTS",
        help="a run, a checkpoint, a safetensors file, or a .pth of the authors (docs/own_images.md)",
    )
    parser.add_argument(
        "config", nargs="?", metavar="RECIPE", help="whose values are taken instead of chosen ones"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. schedule.epochs=20")
    own_images.add_data_argument(parser, required=True)
    train.add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Set the run up and train it; returns as ``dattrain train``."""
    from dattrain.cli import own_images, train

    args.run_dir = own_images.begin(args, args.weights)
    args.data = None
    return train.run(args)
