"""What the page shows of a segmentation's predictions (``dattrain.tasks.segmented_images``): its classes, and images under their maps."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dattrain.palette import is_background, map_image, palette
from dattrain.report.extremes import extremes
from dattrain.tasks.predictions import png_url

KIND = "segmentation"
PAIRS = 15
"""Confused pairs that are listed."""
_LEGEND = 8
"""Classes that are named below an image, the largest first; the others are counted."""


def classes(predictions: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
    """The table of classes, the most frequent first, and the most confused pairs; None where it is of another task."""
    if predictions.get("kind") != KIND:
        return None
    colours = _colours(names)
    pixels = {row["class"]: row["pixels"] for row in predictions["classes"]}
    total = sum(pixels.values()) or 1
    rows = sorted(predictions["classes"], key=lambda row: (-row["pixels"], row["class"]))
    return {
        "step": predictions["step"],
        "images": predictions["images"],
        "rows": [
            [names[row["class"]], colours[row["class"]], row["iou"], row["accuracy"], row["pixels"] / total]
            for row in rows
        ],
        "absent": len(names) - len(rows),
        "pairs": [[names[a], names[b], n / pixels[a], n / total] for a, b, n in predictions["pairs"][:PAIRS]],
    }


def images(predictions: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
    """The worst and the best images; None where it is of another task, or shows none."""
    if predictions.get("kind") != KIND or not (predictions.get("worst") or predictions.get("best")):
        return None
    colours = _colours(names)

    def shown(items: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        for item in items:
            maps = {key: numbers(item[key]) for key in ("truth", "prediction")}
            there = _largest(maps.values(), len(names))
            yield {
                **{key: item[key] for key in ("name", "iou", "accuracy", "picture")},
                **{key: png_url(map_image(each, names)) for key, each in maps.items()},
                "legend": [[names[number], colours[number]] for number in there[:_LEGEND]],
                "more": len(there[_LEGEND:]),
            }

    return {
        "step": predictions["step"],
        "averaged": predictions.get("averaged"),
        **{kind: list(shown(items)) for kind, items in extremes(predictions).items()},
    }


def numbers(url: str) -> np.ndarray:
    """H x W uint8: the class numbers of a ``truth`` or a ``prediction``."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def _largest(maps: Iterable[np.ndarray], count: int) -> list[int]:
    """Classes of an image's truth and prediction, those of the most pixels first."""
    pixels = np.bincount(np.concatenate([each.reshape(-1) for each in maps]), minlength=256)[:count]
    return [int(number) for number in np.argsort(-pixels, kind="stable") if pixels[number]]


def _colours(names: Sequence[str]) -> list[str | None]:
    """``#rrggbb`` of each class; None of the background, which has none."""
    return [
        None if is_background(name) else "#" + bytes(rgb.tolist()).hex()
        for name, rgb in zip(names, palette(len(names)))
    ]
