"""Images of an evaluation on one sheet, each with its label and what it was taken for: for loggers, which take pictures without text."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE, COLUMNS = 160, 6
"""Pixels of an image's longer side, and images in a row."""
_TEXT = 32
_RIGHT, _WRONG = "#00664a", "#a8231f"


def sheet(items: Sequence[Mapping[str, Any]], names: Sequence[str]) -> np.ndarray:
    """H x W x 3 uint8, of some of ``Evaluator.predictions``'s images; ``names`` of the classes, by number, or none."""
    rows, columns = -(-len(items) // COLUMNS), min(COLUMNS, len(items))
    canvas = Image.new("RGB", (columns * (TILE + 8), rows * (TILE + _TEXT + 8)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    for number, item in enumerate(items):
        x, y = number % COLUMNS * (TILE + 8) + 4, number // COLUMNS * (TILE + _TEXT + 8) + 4
        picture = Image.open(io.BytesIO(base64.b64decode(item["picture"].partition(",")[2]))).convert("RGB")
        scale = TILE / max(picture.size)
        filter_ = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC
        picture = picture.resize([max(1, round(side * scale)) for side in picture.size], filter_)
        canvas.paste(picture, (x, y))
        label, predicted = (_name(item[key], names) for key in ("label", "predicted"))
        right = item["label"] == item["predicted"]
        draw.text((x, y + TILE + 2), label[:26], "black", font)
        said = f"{predicted[:20]} {100 * item['confidence']:.0f} %"
        draw.text((x, y + TILE + 16), said, _RIGHT if right else _WRONG, font)
    return np.asarray(canvas)


def _name(number: int, names: Sequence[str]) -> str:
    return names[number] if number < len(names) else f"class {number}"
