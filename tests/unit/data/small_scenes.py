"""Small sets for segmentation, and recipes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pictures import encode
from PIL import Image

from dattrain.config.schema import Config

COLOURS = np.array([(30 * k, 255 - 25 * k, 60 + 15 * k) for k in range(8)], np.uint8)
"""Of the classes: an image of these says what its map must be."""


def scene(rng: np.random.Generator, height: int, width: int, *, classes: int = 6) -> np.ndarray:
    """A map, H x W uint8: boxes of 1..classes over void (0), as ADE20K's are numbered."""
    numbers = np.zeros((height, width), np.uint8)
    for _ in range(12):
        top, left = rng.integers(0, height), rng.integers(0, width)
        numbers[top : top + height // 2, left : left + width // 2] = rng.integers(1, classes + 1)
    return numbers


def write_scene(root: Path, name: str, numbers: np.ndarray, split: str = "training") -> None:
    """An image in the colours of its map, without loss, and the map."""
    for kind, pixels in (("images", COLOURS[numbers]), ("annotations", numbers)):
        path = root / kind / split / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(Image.fromarray(pixels), "PNG"))


def write_set(root: Path, count: int, *, classes: int = 6, split: str = "training", seed: int = 0) -> Path:
    """An ADE20K-like folder of scenes of 40 to 90 pixels a side; returns the folder to name."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        height, width = rng.integers(40, 90, 2).tolist()
        write_scene(root, f"{i:03d}", scene(rng, height, width, classes=classes), split)
    names = "\n".join(f"{k}\t0.1\t1\t1\tthing{k}" for k in range(1, classes + 1))
    (root / "objectInfo150.txt").write_text(f"Idx\tRatio\tTrain\tVal\tName\n{names}\n")
    return root / "images" / split


def recipe(folder: Path, /, *, classes: int = 6, **sections: dict) -> Config:
    """A recipe of segmentation on small images; ``sections`` are merged into it."""
    base: dict[str, dict] = {
        "task": {"kind": "segmentation", "norm": "group"},
        "model": {"num_classes": classes},
        "data": {"train": str(folder), "val": str(folder), "workers": 0, "lanes": 4, "window": 1},
        "geometry": {"short_side": 48, "long_side": 96, "crop": 32},
        "augment": {
            "mix_prob": 0.0,
            "randaugment": None,
            "erase_prob": 0.0,
            "label_smoothing": 0.0,
            "interpolation": "bilinear",
        },
        "eval": {"batch": 1},
        "train": {"global_batch": 12, "micro_batch": 2},
    }
    return Config.model_validate(
        {key: {**base.get(key, {}), **sections.get(key, {})} for key in {**base, **sections}}
    )
