"""Small scenes of objects as a COCO JSON beside a folder of images: what detection is tested with. Masks and boxes are exact."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dattrain.data.annotations import rle

CATEGORIES = {3: "box", 7: "bar", 12: "disc"}
"""By id: with gaps, and not from 0 on."""
COLOURS = np.array([[200, 60, 50], [60, 80, 200], [230, 210, 90]])
GROUND = np.array([90, 110, 80])


class Shape(NamedTuple):
    """An object: its number among ``CATEGORIES``, and the pixels of it that are seen (H x W bool)."""

    number: int
    mask: np.ndarray

    @property
    def box(self) -> list[int]:
        """x, y, width and height of the smallest box around it."""
        ys, xs = np.nonzero(self.mask)
        return [int(v) for v in (xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min())]


def scene(
    seed: int, index: int, *, size: tuple[int, int] | None = None, most: int = 4
) -> tuple[np.ndarray, list[Shape]]:
    """Image (H x W x 3 uint8, sides of 56 to 99 unless told) and up to ``most`` objects; every seventh image has none.

    A later object hides an earlier one's pixels, and those of less than 16 pixels left are none.
    """
    random = np.random.default_rng([seed, index])
    height, width = size or (int(side) for side in random.integers(56, 100, 2))
    y, x = np.mgrid[:height, :width]
    shapes: list[Shape] = []
    pixels = np.broadcast_to(GROUND, (height, width, 3)).astype(np.float64)
    for _ in range(0 if index % 7 == 6 else int(random.integers(1, most + 1))):
        number, cy, cx, r = (
            int(random.integers(a, b)) for a, b in ((0, 3), (0, height), (0, width), (8, 20))
        )
        mask = [
            (abs(y - cy) < r) & (abs(x - cx) < r),
            (abs(y - cy) < max(3, r // 3)) & (abs(x - cx) < 2 * r),
            (y - cy) ** 2 + (x - cx) ** 2 < r * r,
        ][number]
        shapes = [Shape(one.number, one.mask & ~mask) for one in shapes] + [Shape(number, mask)]
        pixels[mask] = COLOURS[number]
    pixels = pixels + random.normal(0, 12, (height, width, 1))
    return pixels.clip(0, 255).astype(np.uint8), [one for one in shapes if one.mask.sum() >= 16]


def annotation(shape: Shape, number: int, image: int, *, crowd: bool = False) -> dict[str, Any]:
    """COCO's entry of an object: a polygon where it fills its box, else run lengths (compressed, or a list for a crowd)."""
    left, top, width, height = shape.box
    right, bottom = left + width, top + height
    counts = rle.encode(shape.mask)
    segmentation: Any = {"size": list(shape.mask.shape), "counts": rle.to_string(counts)}
    if crowd:
        segmentation["counts"] = counts.tolist()
    elif shape.mask.sum() == width * height:
        segmentation = [[left, top, right, top, right, bottom, left, bottom]]
    return {
        "id": number,
        "image_id": image,
        "category_id": list(CATEGORIES)[shape.number],
        "bbox": shape.box,
        "area": int(shape.mask.sum()),
        "iscrowd": int(crowd),
        "segmentation": segmentation,
    }


def write_part(
    folder: Path,
    part: str,
    scenes: dict[int, tuple[np.ndarray, list[Shape]]],
    *,
    crowds: tuple[int, ...] = (),
) -> Path:
    """Write ``part.json`` and the images ``part/*.png``; ``scenes`` by image id, the first object of each of ``crowds`` is one."""
    (folder / part).mkdir(parents=True)
    images, annotations = [], []
    for index, (pixels, shapes) in scenes.items():
        height, width = pixels.shape[:2]
        name = f"{index:04d}.png"
        Image.fromarray(pixels).save(folder / part / name)
        images.append({"id": index, "file_name": name, "height": height, "width": width})
        for i, shape in enumerate(shapes):
            crowd = index in crowds and i == 0
            annotations.append(annotation(shape, 100 + len(annotations), index, crowd=crowd))
    categories = [{"id": key, "name": name} for key, name in CATEGORIES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = folder / f"{part}.json"
    path.write_text(json.dumps(content))
    return path


def write(
    folder: Path, *, train: int = 24, val: int = 5, crowds: tuple[int, ...] = (3, 25), seed: int = 0
) -> list[str]:
    """Write a set of scenes; returns the overrides that name it. Image ids are the scenes' indices plus 1000."""
    for part, first, count in (("train", 0, train), ("val", train, val)):
        scenes = {1000 + index: scene(seed, index) for index in range(first, first + count)}
        write_part(folder, part, scenes, crowds=tuple(1000 + index for index in crowds))
    return [f"data.train={folder}/train.json", f"data.val={folder}/val.json"]


RECIPE: dict[str, Any] = {
    "name": "objects",
    "task": {"kind": "detection", "head": "mask_rcnn", "norm": "group", "channels": 32},
    "model": {"name": "dat_atto", "img_size": 64, "num_classes": len(CATEGORIES), "drop_path": 0.2},
    "geometry": {"short_side": 64, "short_sides": [48, 64], "long_side": 96, "scale": [1.0, 1.0], "crop": None},
    "data": {"lanes": 4, "workers": 0},
    "augment": {"randaugment": None, "mix_prob": 0.0, "erase_prob": 0.0, "label_smoothing": 0.0, "interpolation": "bilinear"},
    "eval": {"batch": 1},
    "optim": {"lr": 1e-3, "lr_batch": 8},
    "schedule": {"kind": "step", "updates": 12, "warmup_updates": 2, "milestones": [8, 11], "min_lr": 0.0},
    "train": {"global_batch": 8, "micro_batch": 2, "max_steps": 4, "threads": 1, "ema_decay": 0.9, "precision": "fp32"},
    "checkpoint": {"every_steps": 1000, "metric": "ap"},
}  # fmt: skip
"""dat_atto and Mask R-CNN of 32 channels at 64 pixels, drop path on, two micro-batches per rank and update on two ranks."""


def recipe_of(head: str) -> dict[str, Any]:
    """``RECIPE`` with another detector."""
    recipe = copy.deepcopy(RECIPE)
    recipe["task"]["head"] = head
    return recipe


RETINANET = recipe_of("retinanet")
