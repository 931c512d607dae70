"""The steps that the demos of dense prediction share: scenes, trainings with and without classification weights, evaluations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dattrain.cli.demo_steps import (
    classification,
    clear,
    dattrain,
    execute,
    kill_half_way,
    pack,
    train_command,
)
from dattrain.errors import UserError

SCENES = {"train": 2000, "val": 400}
"""How many each split has; those of ``val`` are of items that no training has seen."""


def prepare(
    out: Path, recipe: str, trainings: Sequence[str], nproc: int, init: Path | None
) -> tuple[list[str], Path]:
    """Empty ``out`` and pack scenes into it; returns the overrides that name them, and the classification run to start from.

    Args:
        recipe: names the picture, beside ``trainings``, the run folders.
        init: a classification run; None trains one.

    Raises:
        UserError: a step fails, or ``out`` holds what no demo made.
    """
    if init is not None and not init.is_dir():
        raise UserError(f"--init {init}: no such run folder; `dattrain demo` makes demo-out/finetune")
    runs = ("pretrain", "finetune", *trainings)
    reports = (f"{name}-eval.json" for name in trainings)
    clear(out, {"shards", "scenes", "scene-shards", *runs, *reports, f"{recipe}.png", "result.json"}, runs)
    train, val = pack(out)
    if init is None:
        _, init = classification(out, nproc, train, val, ())
    return _pack_scenes(out, train, val), init


def with_and_without(
    recipe: str, out: Path, nproc: int, init: Path, data: Sequence[str], overrides: Sequence[str]
) -> None:
    """Train ``out/RECIPE`` from ``init``, killed half way and resumed, and ``out/scratch`` from random weights."""
    run = out / recipe
    command = train_command(recipe, run, nproc, [*data, f"init.from={init}", *overrides])
    kill_half_way(command, run)
    execute(command)
    execute(train_command(recipe, out / "scratch", nproc, [*data, *overrides]))


def evaluate(out: Path, trainings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Reports of ``dattrain eval`` of the runs in ``out``, by name."""
    found = {}
    for name in trainings:
        report = out / f"{name}-eval.json"
        execute([*dattrain(), "eval", str(out / name), "--json", str(report)])
        found[name] = json.loads(report.read_text())
    return found


def finish(out: Path, result: Mapping[str, float], metric: str, overrides: Sequence[str]) -> None:
    """Write ``out/result.json``. Raises UserError where the recipe as it is did not gain from pre-trained weights."""
    (out / "result.json").write_text(json.dumps(result) + "\n")
    if result[metric] <= result[f"{metric}_scratch"] and not overrides:
        raise UserError(
            "pre-trained weights did not win over random ones: something is wrong on this machine; please report it"
        )


def _pack_scenes(out: Path, train: str, val: str) -> list[str]:
    """Make scenes of the items of two sets and pack them into ``out/scene-shards``; returns the overrides that name them."""
    from dattrain.demo import scenes
    from dattrain.demo.results import CLASSES, read

    shards = out / "scene-shards"
    for seed, (split, spec) in enumerate((("train", train), ("val", val))):
        count = SCENES[split]
        file = scenes.write(out / "scenes" / split, *read(spec), CLASSES, seed=seed, count=count)
        print(f"\n{count:,} scenes: {file}", flush=True)
        execute(
            [*dattrain(), "data", "pack", "--coco", str(file), str(shards), "--split", split, "--per-shard", "200"]
        )  # fmt: skip
    return [f"data.{split}={shards}/{split}-*.tar" for split in SCENES]
