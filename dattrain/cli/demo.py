"""``dattrain demo``: from raw images to a fine-tuned network, in minutes on a laptop; ``dattrain demo segment|detect``: on to scenes.

Pack Fashion-MNIST into shards, pre-train dat_atto at 32 x 32 on two local ranks, kill the run on purpose, resume it,
fine-tune at 64 x 64, evaluate both, and draw curves and sampling points. Every step is a command that it prints first. What comes
after in dense prediction is in ``demo_segment`` and ``demo_detect``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from dattrain.cli import demo_detect, demo_segment
from dattrain.cli.demo_steps import classification, clear, dattrain, execute, pack
from dattrain.errors import ConfigError, UserError

RUNS = ("pretrain", "finetune")
MADE = frozenset({"shards", *RUNS, "pretrain-eval.json", "finetune-eval.json", "demo.png"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for everything made (default: demo-out, demo-segment, or demo-detect)",
    )
    parser.add_argument("--nproc", type=int, default=2, help="local ranks (default: 2)")
    parser.add_argument(
        "--init",
        type=Path,
        metavar="RUN",
        help="of segment and detect: the classification run to start from, as demo-out/finetune (default: train one first)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="[segment|detect] key=value",
        help="segment: semantic segmentation of scenes; detect: objects in them; settings for the trainings, e.g. train.seed=1",
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo; raises UserError where a step fails."""
    onward = {"segment": demo_segment.run, "detect": demo_detect.run}
    which = next(iter(args.overrides), "")
    if which in onward:
        return onward[which](args.out or Path(f"demo-{which}"), args.nproc, args.init, args.overrides[1:])
    if args.init is not None:
        raise ConfigError("--init is of `dattrain demo segment` and `dattrain demo detect`")
    if odd := [word for word in args.overrides if "=" not in word]:
        raise ConfigError(
            f"demo {odd[0]}: there is `dattrain demo`, `dattrain demo segment` and `dattrain demo detect`; settings are key=value"
        )
    return _classify(args.out or Path("demo-out"), args.nproc, args.overrides)


def _classify(out: Path, nproc: int, overrides: Sequence[str]) -> int:
    from dattrain.demo.results import nearest_neighbour, picture, read

    started = time.perf_counter()
    clear(out, MADE, RUNS)
    train, val = pack(out)
    trained = time.perf_counter()
    pretrain, finetune = classification(out, nproc, train, val, overrides)
    trained = time.perf_counter() - trained
    rows = [("1-nearest neighbour on pixels", nearest_neighbour(*read(train), *read(val)))]
    for name, folder in (("dat_atto, 32 x 32", pretrain), ("fine-tuned, 64 x 64", finetune)):
        report = out / f"{folder.name}-eval.json"
        execute([*dattrain(), "eval", str(folder), "--json", str(report)])
        rows.append((name, json.loads(report.read_text())["top1"]))
    picture(out / "demo.png", pretrain, finetune, *read(val))
    print(f"\n{'':34}top-1 on 2,000 test images")
    for name, top1 in rows:
        print(f"{name:34}{top1:6.2f} %")
    print(f"\ncurves and sampling points: {out / 'demo.png'}")
    print(f"training {trained:.0f} s, everything {time.perf_counter() - started:.0f} s")
    if max(top1 for _, top1 in rows[1:]) <= rows[0][1] and not overrides:
        raise UserError(
            "the network did not beat 1-nearest neighbour: something is wrong on this machine; please report it"
        )
    return 0
