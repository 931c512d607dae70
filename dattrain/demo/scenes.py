"""Scenes for the demo of dense prediction: pictures of Fashion-MNIST pasted over one another on a coloured background.

What is visible of each item is its mask, so the truth is exact: instances, their boxes, and the class of every pixel. A scene is a
function of (seed, index) and of the items that it is made of.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dattrain.data.annotations import rle

_SIDES = (64, 80, 96)
_ITEM = (40, 65)
"""Pixels of an item's side: the least, and the first that is too many."""
_MOST_ITEMS = 3
_EMPTY = 0.05
"""Share of scenes without any item."""
_INK = 24
"""Grey value above which a pixel of an item is its own, not its background."""
_VISIBLE = 25
"""Pixels that must be left of an item for it to be an instance."""


@dataclass(frozen=True)
class Scene:
    """``image`` H x W x 3 uint8; ``labels`` of its N instances; ``masks`` N x H x W bool, which do not overlap."""

    image: NDArray[np.uint8]
    labels: tuple[int, ...]
    masks: NDArray[np.bool_]


def scene(items: NDArray[np.uint8], labels: NDArray[np.uint8], seed: int, index: int) -> Scene:
    """Scene ``index`` of the ``items`` (n x 28 x 28, with their ``labels``): 64 to 96 pixels a side, up to three items."""
    draw = np.random.default_rng((seed, index))
    height, width = (int(side) for side in draw.choice(_SIDES, 2))
    first, last = draw.uniform(0, 40, (2, 3))
    across, down = draw.uniform(0, 1, 2)
    along = np.linspace(0, across, width)[None, :, None] + np.linspace(0, down, height)[:, None, None]
    pixels = first + (last - first) * np.clip(along, 0, 1) + draw.normal(0, 4, (height, width, 3))
    owner = np.full((height, width), -1)
    found: list[int] = []
    for _ in range(0 if draw.random() < _EMPTY else int(draw.integers(1, _MOST_ITEMS + 1))):
        number, side = int(draw.integers(len(items))), int(draw.integers(*_ITEM))
        top, left = (int(draw.integers(-side // 5, size - side + side // 5 + 1)) for size in (height, width))
        tint = draw.uniform(0.8, 1, 3)
        item = np.asarray(Image.fromarray(items[number]).resize((side, side), Image.Resampling.BILINEAR))
        rows = slice(max(0, top), min(height, top + side))
        columns = slice(max(0, left), min(width, left + side))
        seen = item[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        ink = seen > _INK
        pixels[rows, columns][ink] = seen[ink][:, None] * tint
        owner[rows, columns][ink] = len(found)
        found.append(int(labels[number]))
    masks = owner == np.arange(len(found))[:, None, None]
    visible = masks.sum((1, 2)) >= _VISIBLE
    kept = tuple(label for label, there in zip(found, visible) if there)
    return Scene(np.clip(pixels, 0, 255).astype(np.uint8), kept, masks[visible])


def write(
    folder: Path,
    items: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    names: tuple[str, ...],
    *,
    seed: int,
    count: int,
) -> Path:
    """Write ``count`` scenes as PNG files into ``folder/images`` and as COCO's ``folder/instances.json``, whose path is returned."""
    (folder / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        made = scene(items, labels, seed, index)
        name = f"{index:05}.png"
        Image.fromarray(made.image).save(folder / "images" / name, compress_level=1)
        height, width = made.image.shape[:2]
        images.append({"id": index, "file_name": name, "height": height, "width": width})
        for number, instance in enumerate(_instances(made)):
            annotations.append({"id": 10 * index + number, "image_id": index, **instance})
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def _instances(made: Scene) -> Iterator[dict[str, Any]]:
    for label, mask in zip(made.labels, made.masks):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        top, left = int(rows[0]), int(columns[0])
        yield {
            "category_id": label + 1,
            "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
            "area": int(mask.sum()),
            "iscrowd": 0,
            "segmentation": {"size": list(mask.shape), "counts": rle.to_string(rle.encode(mask))},
        }
