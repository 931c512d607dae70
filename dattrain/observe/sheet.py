"""Images of an evaluation on one sheet, each with its label, map or objects and what was found: for loggers, which take pictures without text."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dattrain.drawing import Shape
from dattrain.drawing import draw as draw_objects
from dattrain.palette import map_image
from dattrain.text import shortened

TILE, COLUMNS = 160, 6
"""Pixels of an image's longer side, and images in a row."""
_TEXT = 32
_RIGHT, _WRONG = "#00664a", "#a8231f"


def sheet(items: Sequence[Mapping[str, Any]], names: Sequence[str]) -> np.ndarray:
    """H x W x 3 uint8, of some of ``Evaluator.predictions``'s images; ``names`` of the classes, by number, or none.

    An image with maps (``truth``, ``prediction``) stands beside them, with its mean IoU; in the maps the background is white. One with
    objects (``truth``, ``found``) is there twice, under its objects and under what was found, and twice as large, so that names can be read.
    """
    if "found" in items[0]:
        return _table(items, 2, 2 * TILE, lambda item: _objects(item, names), _quality)
    if "prediction" in items[0]:
        return _table(items, COLUMNS // 3, TILE, lambda item: _maps(item, names), _iou)
    return _table(
        items,
        COLUMNS,
        TILE,
        lambda item: [_tile(_image(item["picture"]), TILE)],
        lambda item: _classes(item, names),
    )


def _table(
    items: Sequence[Mapping[str, Any]],
    in_row: int,
    side: int,
    tiles: Callable[[Mapping[str, Any]], list[Image.Image]],
    said: Callable[[Mapping[str, Any]], list[tuple[str, str]]],
) -> np.ndarray:
    """Items in rows: the tiles of each (RGBA, ``side`` pixels at most) beside each other, below them two lines: text and colour."""
    drawn = [tiles(item) for item in items]
    each, in_row = len(drawn[0]), min(in_row, len(items))
    rows = -(-len(items) // in_row)
    canvas = Image.new("RGB", (in_row * each * (side + 8), rows * (side + _TEXT + 8)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    for number, (item, parts) in enumerate(zip(items, drawn)):
        x = number % in_row * each * (side + 8) + 4
        y = number // in_row * (side + _TEXT + 8) + 4
        for column, tile in enumerate(parts):
            canvas.paste(tile, (x + column * (side + 8), y), tile)
        for line, (text, colour) in enumerate(said(item)):
            draw.text((x, y + side + 2 + 14 * line), text, colour, font)
    return np.asarray(canvas)


def _maps(item: Mapping[str, Any], names: Sequence[str]) -> list[Image.Image]:
    maps = (map_image(np.asarray(_image(item[kind])), names) for kind in ("truth", "prediction"))
    return [_tile(_image(item["picture"]), TILE), *(_tile(each, TILE, plain=True) for each in maps)]


def _objects(item: Mapping[str, Any], names: Sequence[str]) -> list[Image.Image]:
    picture = _image(item["picture"]).convert("RGB")
    scale = 2 * TILE / max(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    pixels = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
    found = []
    for kind in ("truth", "found"):
        masks = None
        if (url := item.get(f"{kind}_masks")) is not None:
            masks = np.asarray(_image(url).resize(size, Image.Resampling.NEAREST))
        shapes = []
        for place, one in enumerate(item[kind], 1):
            x, y, width, height = (scale * value for value in one["box"])
            score = f" {one['score']:.0%}" if "score" in one else ""
            mask = None if masks is None else masks == place
            text = f"{shortened(_name(one['class'], names), 16)}{score}"
            shapes.append(Shape((x, y, x + width, y + height), one["class"], text, mask))
        found.append(Image.fromarray(draw_objects(pixels, shapes)).convert("RGBA"))
    return found


def _quality(item: Mapping[str, Any]) -> list[tuple[str, str]]:
    right = sum(one["right"] for one in item["found"])
    objects = sum(not one["crowd"] for one in item["truth"])
    return [
        (item["name"][-100:], "black"),
        (f"truth, found: {right} of {objects} objects, quality {item['quality']:.1f} %", "black"),
    ]


def _iou(item: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (item["name"][-60:], "black"),
        (f"image, truth, prediction: IoU {item['iou']:.1f} %", "black"),
    ]


def _classes(item: Mapping[str, Any], names: Sequence[str]) -> list[tuple[str, str]]:
    label, predicted = (_name(item[key], names) for key in ("label", "predicted"))
    said = f"{predicted[:20]} {100 * item['confidence']:.0f} %"
    return [(label[:26], "black"), (said, _RIGHT if item["label"] == item["predicted"] else _WRONG)]


def _image(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def _tile(picture: Image.Image, side: int, *, plain: bool = False) -> Image.Image:
    """A picture at the size of a tile, RGBA; ``plain`` mixes no colours."""
    picture, scale = picture.convert("RGBA"), side / max(picture.size)
    filter_ = Image.Resampling.NEAREST if plain or scale > 2 else Image.Resampling.BICUBIC
    return picture.resize([max(1, round(each * scale)) for each in picture.size], filter_)


def _name(number: int, names: Sequence[str]) -> str:
    return names[number] if number < len(names) else f"class {number}"
