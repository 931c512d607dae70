"""``dattrain lr-find``: a learning-rate range test of a recipe."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "config", metavar="CONFIG", help="a recipe, or a run folder for its recipe; left alone"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--min", type=float, default=1e-7, metavar="LR", help="first rate (1e-7)")
    parser.add_argument("--max", type=float, default=1.0, metavar="LR", help="last rate (1)")
    parser.add_argument("--updates", type=int, default=100, metavar="N", help="rates, one update each (100)")
    parser.add_argument(
        "--run", dest="folder", metavar="DIR", type=Path,
        help="where lr_find.png and lr_find.json go (a temporary folder)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Exit code 0; 1 where the loss did not fall, so that nothing can be suggested."""
    import tempfile

    from dattrain.config.load import load
    from dattrain.planning import lr_range
    from dattrain.text import columns

    config = load(args.config, args.overrides).config
    over = lr_range.rates(args.min, args.max, args.updates)
    batch = config.train.global_batch
    print(
        f"{config.name}: {len(over)} updates of {batch} images at rates from {args.min:g} to {args.max:g}, "
        f"on {lr_range.device_name(os.environ)}",
        flush=True,
    )
    every = max(1, len(over) // 10)

    def say(update: int, rate: float, loss: float) -> None:
        if update % every == 0:
            print(f"  {update}/{len(over)}  rate {rate:.2e}  loss {loss:.4f}", file=sys.stderr, flush=True)

    found = lr_range.run(config, over, environ=os.environ, say=say)
    if not found.losses:
        print("the loss of the first update is not finite already: nothing can be suggested")
        return 1
    suggested = lr_range.suggest(found)
    curve = lr_range.smooth(found.losses)
    shown = range(0, len(curve), max(1, len(curve) // 15))
    rows = [("RATE", "optim.lr", "LOSS", "SMOOTHED")]
    rows += [
        (f"{found.rates[n]:.2e}", f"{lr_range.stated(config, found.rates[n]):.2e}", f"{found.losses[n]:.4f}", f"{curve[n]:.4f}")
        for n in shown
    ]  # fmt: skip
    print("\n".join(columns(rows)))
    print(lr_range.bars(curve))
    if found.diverged:
        print(f"the loss diverged, so the test ended after {len(found.losses)} of {len(over)} updates")
    data, picture = lr_range.write(
        args.folder or Path(tempfile.mkdtemp(prefix="dattrain-lr-find-")), config, found, suggested
    )
    print(f"{picture}\n{data}")
    if suggested is None:
        print(
            "the loss did not fall enough to read a rate off it: try more --updates, or other --min and --max"
        )
        return 1
    print(
        f"lowest loss at {suggested.lowest:.2e}, steepest descent at {suggested.steepest:.2e} (at a batch of {batch}); "
        f"as a setting:\n  optim.lr={lr_range.stated(config, suggested.steepest):.2e}"
    )
    return 0
