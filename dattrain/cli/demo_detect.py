"""``dattrain demo detect``: objects in scenes, from the demo's classification weights and from random ones, and their masks.

Scenes of the demo's pictures are made and packed. dat_atto with RetinaNet is trained on them, killed on purpose and resumed, and the
same training is run from random weights beside it; then Mask R-CNN, which finds masks too. Validation scenes hold items that no training
has seen.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from dattrain.cli.demo_scenes import SCENES, evaluate, finish, prepare, with_and_without
from dattrain.cli.demo_steps import execute, train_command

TRAININGS = {
    "detect": "RetinaNet, from classification weights",
    "scratch": "RetinaNet, from random weights",
    "masks": "Mask R-CNN, from classification weights",
}
"""Titles by run folder."""


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
    data, init = prepare(out, "detect", tuple(TRAININGS), nproc, init)
    trained = time.perf_counter()
    with_and_without("detect", out, nproc, init, data, overrides)
    execute(train_command("masks", out / "masks", nproc, [*data, f"init.from={init}", *overrides]))
    trained = time.perf_counter() - trained
    found = evaluate(out, tuple(TRAININGS))
    runs = {title: out / name for name, title in TRAININGS.items()}
    picture(out / "detect.png", runs, f"{out}/scene-shards/val-*.tar")
    print(f"\n{'':46}{'AP':>8}{'AP50':>8}  on {SCENES['val']} scenes of unseen items")
    for title, name, kind in (
        *((title, name, "") for name, title in TRAININGS.items()),
        ("    its masks", "masks", "mask_"),
    ):
        print(f"{title:46}{found[name][f'{kind}ap']:8.2f}{found[name][f'{kind}ap50']:8.2f}")
    print(f"\ncurves and scenes: {out / 'detect.png'}")
    print(f"training on scenes {trained:.0f} s, everything {time.perf_counter() - started:.0f} s")
    result = {
        "ap": found["detect"]["ap"],
        "ap50": found["detect"]["ap50"],
        "ap50_scratch": found["scratch"]["ap50"],
        "mask_ap50": found["masks"]["mask_ap50"],
    }
    finish(out, result, "ap50", overrides)
    return 0
