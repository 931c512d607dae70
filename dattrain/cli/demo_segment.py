"""``dattrain demo segment``: semantic segmentation of scenes, from the demo's classification weights and from random ones.

Scenes of the demo's pictures are made and packed, dat_atto with a Semantic FPN is trained on them, killed on purpose and resumed, and
the same training is run from random weights beside it. Validation scenes hold items that no training has seen.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from dattrain.cli.demo_steps import (
    classification,
    clear,
    dattrain,
    execute,
    kill_half_way,
    pack,
    pack_scenes,
    train_command,
)
from dattrain.errors import UserError

RUNS = ("pretrain", "finetune", "segment", "scratch")
MADE = frozenset(
    {
        "shards",
        "scenes",
        "scene-shards",
        *RUNS,
        "segment-eval.json",
        "scratch-eval.json",
        "segment.png",
        "result.json",
    }
)
SCENES = {"train": 2000, "val": 400}


def run(out: Path, nproc: int, init: Path | None, overrides: Sequence[str]) -> int:
    """Run the demo; ``out/result.json`` has ``miou`` and ``miou_scratch`` in percent. Raises UserError where a step fails.

    Args:
        init: the classification run to start from; None trains one first.
        overrides: ``key=value`` for the two trainings on scenes.
    """
    from dattrain.demo.segmentation import picture

    started = time.perf_counter()
    if init is not None and not init.is_dir():
        raise UserError(f"--init {init}: no such run folder; `dattrain demo` makes demo-out/finetune")
    clear(out, MADE, RUNS)
    train, val = pack(out)
    if init is None:
        _, init = classification(out, nproc, train, val, ())
    data = pack_scenes(out, train, val, SCENES)
    trained = time.perf_counter()
    segment, scratch = out / "segment", out / "scratch"
    command = train_command("segment", segment, nproc, [*data, f"init.from={init}", *overrides])
    kill_half_way(command, segment)
    execute(command)
    execute(train_command("segment", scratch, nproc, [*data, *overrides]))
    trained = time.perf_counter() - trained
    found = {}
    for folder in (segment, scratch):
        report = out / f"{folder.name}-eval.json"
        execute([*dattrain(), "eval", str(folder), "--json", str(report)])
        found[folder.name] = json.loads(report.read_text())["miou"]
    picture(out / "segment.png", segment, scratch, f"{out}/scene-shards/val-*.tar")
    result = {"miou": found["segment"], "miou_scratch": found["scratch"]}
    (out / "result.json").write_text(json.dumps(result) + "\n")
    print(f"\n{'':34}mIoU on {SCENES['val']} scenes of unseen items")
    for name, miou in (
        ("from classification weights", result["miou"]),
        ("from random weights", result["miou_scratch"]),
    ):
        print(f"{name:34}{miou:6.2f} %")
    print(f"\ncurves and scenes: {out / 'segment.png'}")
    print(f"training on scenes {trained:.0f} s, everything {time.perf_counter() - started:.0f} s")
    if result["miou"] <= result["miou_scratch"] and not overrides:
        raise UserError(
            "pre-trained weights did not win over random ones: something is wrong on this machine; please report it"
        )
    return 0
