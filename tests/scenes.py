"""Small scenes with a map of classes each, as a folder of images beside one of maps: what segmentation is tested with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ground", "box", "bar", "disc")
COLOURS = np.array([[90, 110, 80], [200, 60, 50], [60, 80, 200], [230, 210, 90]])
VOID = 255


def scene(seed: int, index: int, *, void: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Image (H x W x 3 uint8) and map (H x W uint8): up to three shapes on the ground, an edge of void; ``void``: nothing else."""
    random = np.random.default_rng([seed, index])
    height, width = (int(side) for side in random.integers(56, 100, 2))
    y, x = np.mgrid[:height, :width]
    classes = np.zeros((height, width), np.uint8)
    for _ in range(int(random.integers(1, 4))):
        number, cy, cx, r = (
            int(random.integers(a, b)) for a, b in ((1, 4), (0, height), (0, width), (10, 26))
        )
        shape = {
            1: (abs(y - cy) < r) & (abs(x - cx) < r),
            2: (abs(y - cy) < r // 3) & (abs(x - cx) < 2 * r),
            3: (y - cy) ** 2 + (x - cx) ** 2 < r * r,
        }[number]
        classes[shape] = number
    pixels = COLOURS[classes] + random.normal(0, 12, (height, width, 1))
    classes[:3] = VOID
    if void:
        classes[:] = VOID
    return pixels.clip(0, 255).astype(np.uint8), classes


def write(
    folder: Path, *, train: int = 24, val: int = 5, void: tuple[int, ...] = (), seed: int = 0
) -> list[str]:
    """Write a set of scenes; returns the overrides that name it. Training scenes of the indices ``void`` have no class at all."""
    for part, first, count in (("training", 0, train), ("validation", train, val)):
        for kind in ("images", "annotations"):
            (folder / kind / part).mkdir(parents=True)
        for index in range(first, first + count):
            pixels, classes = scene(seed, index, void=index in void)
            Image.fromarray(pixels).save(folder / "images" / part / f"{index:04d}.png")
            Image.fromarray(classes).save(folder / "annotations" / part / f"{index:04d}.png")
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return [f"data.train={folder}/images/training", f"data.val={folder}/images/validation"]


RECIPE = {
    "name": "scenes",
    "task": {"kind": "segmentation", "head": "upernet", "norm": "group", "channels": 32, "dropout": 0.3},
    "model": {"name": "dat_atto", "img_size": 64, "num_classes": len(CLASSES), "drop_path": 0.2},
    "geometry": {"short_side": 64, "long_side": 128, "scale": [0.75, 1.5], "crop": 64},
    "data": {"lanes": 4, "workers": 0},
    "augment": {"randaugment": None, "mix_prob": 0.0, "erase_prob": 0.0, "label_smoothing": 0.0, "interpolation": "bilinear"},
    "eval": {"batch": 1},
    "optim": {"lr": 1e-3, "lr_batch": 8},
    "schedule": {"kind": "poly", "updates": 12, "warmup_updates": 2, "min_lr": 0.0},
    "train": {"global_batch": 8, "micro_batch": 2, "max_steps": 4, "threads": 1, "ema_decay": 0.9, "precision": "fp32"},
    "checkpoint": {"every_steps": 1000, "metric": "miou"},
}  # fmt: skip
"""dat_atto and a small UperNet at 64 x 64, drop path and dropout on, two micro-batches per rank and update on two ranks."""
