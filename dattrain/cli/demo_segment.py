"""``dattrain demo segment``: semantic segmentation of scenes, from the demo's classification weights and from random ones.

Scenes of the demo's pictures are made and packed, dat_atto with a Semantic FPN is trained on them, killed on purpose and resumed, and
the same training is run from random weights beside it. Validation scenes hold items that no training has seen.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from dattrain.cli.demo_scenes import SCENES, evaluate, finish, prepare, with_and_without

TRAININGS = {"segment": "from classification weights", "scratch": "from random weights"}
"""Titles by run folder."""


def run(out: Path, nproc: int, init: Path | None, overrides: Sequence[str]) -> int:
    """Run the demo; ``out/result.json`` has ``miou`` and ``miou_scratch`` in percent. Raises UserError where a step fails.

    Args:
        init: the classification run to start from; None trains one first.
        overrides: ``key=value`` for the two trainings on scenes.
    """
    from dattrain.demo.segmentation import picture

    started = time.perf_counter()
    data, init = prepare(out, "segment", tuple(TRAININGS), nproc, init)
    trained = time.perf_counter()
    with_and_without("segment", out, nproc, init, data, overrides)
    trained = time.perf_counter() - trained
    found = evaluate(out, tuple(TRAININGS))
    runs = {title: out / name for name, title in TRAININGS.items()}
    picture(out / "segment.png", runs, f"{out}/scene-shards/val-*.tar")
    print(f"\n{'':34}mIoU on {SCENES['val']} scenes of unseen items")
    for name, title in TRAININGS.items():
        print(f"{title:34}{found[name]['miou']:6.2f} %")
    print(f"\ncurves and scenes: {out / 'segment.png'}")
    print(f"training on scenes {trained:.0f} s, everything {time.perf_counter() - started:.0f} s")
    result = {"miou": found["segment"]["miou"], "miou_scratch": found["scratch"]["miou"]}
    finish(out, result, "miou", overrides)
    return 0
