"""``dattrain demo detect``: objects in scenes, from the demo's classification weights and from random ones, and their masks.

Scenes of the demo's pictures are made and packed. dat_atto with RetinaNet is trained on them, killed on purpose and resumed, and the
same training is run from random weights beside it; then Mask R-CNN, which finds masks too. Validation scenes hold items that no training
has seen.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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

TRAININGS = ("detect", "scratch", "masks")
RUNS = ("pretrain", "finetune", *TRAININGS)
MADE = frozenset(
    {
        "shards",
        "scenes",
        "scene-shards",
        *RUNS,
        *(f"{name}-eval.json" for name in TRAININGS),
        "detect.png",
        "result.json",
    }
)
SCENES = {"train": 2000, "val": 400}


def run(out: Path, nproc: int, init: Path | None, overrides: Sequence[str]) -> int:
    """Run the demo; ``out/result.json`` has ``ap``, ``ap50``, ``ap50_scratch`` and ``mask_ap50`` in percent.

    Args:
        init: the classification run to start from; None trains one first.
        overrides: ``key=value`` for the three trainings on scenes.

    Raises:
        UserError: a step fails.
    """
    from dattrain.demo.detection import picture

    started = time.perf_counter()
    if init is not None and not init.is_dir():
        raise UserError(f"--init {init}: no such run folder; `dattrain demo` makes demo-out/finetune")
    clear(out, MADE, RUNS)
    train, val = pack(out)
    if init is None:
        _, init = classification(out, nproc, train, val, ())
    data = pack_scenes(out, train, val, SCENES)
    detect, scratch, masks = (out / name for name in TRAININGS)
    trained = time.perf_counter()
    command = train_command("detect", detect, nproc, [*data, f"init.from={init}", *overrides])
    kill_half_way(command, detect)
    execute(command)
    execute(train_command("detect", scratch, nproc, [*data, *overrides]))
    execute(train_command("masks", masks, nproc, [*data, f"init.from={init}", *overrides]))
    trained = time.perf_counter() - trained
    found: dict[str, dict[str, Any]] = {}
    for folder in (detect, scratch, masks):
        report = out / f"{folder.name}-eval.json"
        execute([*dattrain(), "eval", str(folder), "--json", str(report)])
        found[folder.name] = json.loads(report.read_text())
    titles = (
        "RetinaNet, from classification weights",
        "RetinaNet, from random weights",
        "Mask R-CNN, from classification weights",
    )
    picture(out / "detect.png", dict(zip(titles, (detect, scratch, masks))), f"{out}/scene-shards/val-*.tar")
    result = {
        "ap": found["detect"]["ap"],
        "ap50": found["detect"]["ap50"],
        "ap50_scratch": found["scratch"]["ap50"],
        "mask_ap50": found["masks"]["mask_ap50"],
    }
    (out / "result.json").write_text(json.dumps(result) + "\n")
    print(f"\n{'':46}{'AP':>8}{'AP50':>8}  on {SCENES['val']} scenes of unseen items")
    for title, name, kind in (
        *((title, name, "") for title, name in zip(titles, TRAININGS)),
        ("    its masks", "masks", "mask_"),
    ):
        print(f"{title:46}{found[name][f'{kind}ap']:8.2f}{found[name][f'{kind}ap50']:8.2f}")
    print(f"\ncurves and scenes: {out / 'detect.png'}")
    print(f"training on scenes {trained:.0f} s, everything {time.perf_counter() - started:.0f} s")
    if result["ap50"] <= result["ap50_scratch"] and not overrides:
        raise UserError(
            "pre-trained weights did not win over random ones: something is wrong on this machine; please report it"
        )
    return 0
