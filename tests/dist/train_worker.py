"""One rank of the training tests: trains the jobs of a plan one after another in one process; and what the tests share."""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parents[2] / "dattrain" / "demo"
RECIPE = {
    "name": "test",
    "model": {"name": "dat_atto", "img_size": 32, "num_classes": 10, "drop_path": 0.2},
    "data": {"lanes": 4, "workers": 0},
    "augment": {"randaugment": None, "cutmix": 0.0},
    "eval": {"batch": 16},
    "optim": {"lr": 1e-3, "lr_batch": 32},
    "schedule": {"epochs": 4, "warmup_epochs": 0.5},
    "train": {"global_batch": 32, "micro_batch": 8, "max_steps": 6, "threads": 1, "ema_decay": 0.9},
    "checkpoint": {"every_steps": 1000},
}
"""dat_atto at 32 x 32, two micro-batches per rank and update on two ranks, EMA and drop path on."""


def pack(folder: Path, train: int = 96, val: int = 21) -> list[str]:
    """Pack Fashion-MNIST images into ``folder``; returns the overrides that name the shards."""
    import numpy as np

    from dattrain.cli.main import main

    images, labels = (
        np.frombuffer(gzip.decompress((DEMO / name).read_bytes()), np.uint8, offset=offset)
        for name, offset in (("t10k-images-idx3-ubyte.gz", 16), ("t10k-labels-idx1-ubyte.gz", 8))
    )
    images = images.reshape(-1, 28, 28)
    for part, begin, count in (("train", 0, train), ("val", train, val)):
        chosen = slice(begin, begin + count)
        np.savez(folder / f"{part}.npz", images=images[chosen], labels=labels[chosen])
        arguments = ["data", "pack", str(folder / f"{part}.npz"), str(folder / part), "--split", part]
        assert main([*arguments, "--per-shard", "32", "--jobs", "1"]) == 0
    return [f"data.train={folder}/train", f"data.val={folder}/val"]


def recipe(folder: Path) -> Path:
    """The recipe as a file."""
    import yaml

    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def rows(run: Path, key: str = "loss") -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl that have ``key``."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if key in row]


def curve(run: Path) -> list[tuple[Any, ...]]:
    """What two exact runs must share of every update."""
    return [(r["step"], r["samples"], r["loss"], r["lr"], r["grad_norm"]) for r in rows(run)]


def main(plan: Path) -> None:
    """Train every job of the plan: ``[[recipe, run, [overrides]], ...]``."""
    from dattrain.config.load import load
    from dattrain.engine.train import train
    from dattrain.runtime import environment

    jobs: Sequence[Any] = json.loads(plan.read_text())
    env = environment.resolve(os.environ)
    device = environment.pick_device(env)
    environment.connect(env, device, 120)
    for path, run, overrides in jobs:
        begin = time.perf_counter()
        outcome = train(load(path, overrides).config, Path(run))
        print(f"{run}: {outcome.status} at {outcome.step} in {time.perf_counter() - begin:.1f} s", flush=True)
    environment.disconnect()
    environment.hard_exit(0)


if __name__ == "__main__":
    if "tests_fp16" in os.environ.get("DATTRAIN_TEST", ""):
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True
    main(Path(sys.argv[1]))
