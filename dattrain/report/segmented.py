"""What the page shows of a segmentation's predictions (``dattrain.tasks.segmented_images``): its classes, and images under their maps."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dattrain.palette import palette

KIND = "segmentation"
PAIRS = 15
"""Confused pairs that are listed."""
_LEGEND = 6
"""Classes that are named below an image, the largest first."""


def classes(predictions: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
    """The table of classes, the most frequent first, and the most confused pairs; None where it is of another task."""
    if predictions.get("kind") != KIND:
        return None
    colours = [_colour(each) for each in palette(len(names))]
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
    colours = [_colour(each) for each in palette(len(names))]

    def shown(kind: str) -> Iterator[dict[str, Any]]:
        for item in predictions.get(kind, ()):
            legend = [[names[number], colours[number]] for number in _largest(item, len(names))]
            keys = ("name", "iou", "accuracy", "picture", "truth", "prediction")
            yield {**{key: item[key] for key in keys}, "legend": legend}

    return {
        "step": predictions["step"],
        "averaged": predictions.get("averaged"),
        "worst": list(shown("worst")),
        "best": list(shown("best")),
    }


def numbers(url: str) -> np.ndarray:
    """H x W uint8: the class numbers of a ``truth`` or a ``prediction``."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def _largest(item: Mapping[str, Any], count: int) -> list[int]:
    """Classes of an image's truth and prediction, those of the most pixels first."""
    both = np.concatenate([numbers(item[key]).reshape(-1) for key in ("truth", "prediction")])
    pixels = np.bincount(both, minlength=256)[:count]
    return [int(number) for number in np.argsort(-pixels, kind="stable")[:_LEGEND] if pixels[number]]


def _colour(rgb: np.ndarray) -> str:
    return "#" + bytes(rgb.tolist()).hex()
