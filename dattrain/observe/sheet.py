"""Images of an evaluation on one sheet, each with its label or map and what it was taken for: for loggers, which take pictures without text."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dattrain.palette import map_image

TILE, COLUMNS = 160, 6
"""Pixels of an image's longer side, and images in a row."""
_TEXT = 32
_RIGHT, _WRONG = "#00664a", "#a8231f"


def sheet(items: Sequence[Mapping[str, Any]], names: Sequence[str]) -> np.ndarray:
    """H x W x 3 uint8, of some of ``Evaluator.predictions``'s images; ``names`` of the classes, by number, or none.

    An image with maps (``truth``, ``prediction``) stands beside them, with its mean IoU; in the maps the background is white.
    """
    kinds = ("picture", "truth", "prediction") if "prediction" in items[0] else ("picture",)
    in_row = COLUMNS // len(kinds)
    rows, columns = -(-len(items) // in_row), min(in_row, len(items)) * len(kinds)
    canvas = Image.new("RGB", (columns * (TILE + 8), rows * (TILE + _TEXT + 8)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    for number, item in enumerate(items):
        x = number % in_row * len(kinds) * (TILE + 8) + 4
        y = number // in_row * (TILE + _TEXT + 8) + 4
        for column, kind in enumerate(kinds):
            image: Image.Image = Image.open(io.BytesIO(base64.b64decode(item[kind].partition(",")[2])))
            is_map = kind != "picture"
            image = map_image(np.asarray(image), names) if is_map else image
            tile = _tile(image.convert("RGBA"), plain=is_map)
            canvas.paste(tile, (x + column * (TILE + 8), y), tile)
        if len(kinds) > 1:
            draw.text((x, y + TILE + 2), item["name"][-60:], "black", font)
            draw.text((x, y + TILE + 16), f"image, truth, prediction: IoU {item['iou']:.1f} %", "black", font)
            continue
        label, predicted = (_name(item[key], names) for key in ("label", "predicted"))
        right = item["label"] == item["predicted"]
        draw.text((x, y + TILE + 2), label[:26], "black", font)
        said = f"{predicted[:20]} {100 * item['confidence']:.0f} %"
        draw.text((x, y + TILE + 16), said, _RIGHT if right else _WRONG, font)
    return np.asarray(canvas)


def _tile(picture: Image.Image, *, plain: bool) -> Image.Image:
    """A picture at the size of a tile; ``plain`` mixes no colours."""
    scale = TILE / max(picture.size)
    filter_ = Image.Resampling.NEAREST if plain or scale > 2 else Image.Resampling.BICUBIC
    return picture.resize([max(1, round(side * scale)) for side in picture.size], filter_)


def _name(number: int, names: Sequence[str]) -> str:
    return names[number] if number < len(names) else f"class {number}"
