"""What the page shows of a detector's predictions (``dattrain.tasks.detected_images``): its classes, and images with their objects."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dattrain.drawing import colour
from dattrain.report.extremes import extremes
from dattrain.tasks.predictions import png_url

KIND = "detection"
_NUMBERS = ("ap", "ap50", "mask_ap", "mask_ap50")


def classes(predictions: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
    """The table of classes, those of the most objects first; None where it is of another task.

    ``rows`` are name, colour, objects, detections and the numbers that ``heads`` tells, in percent: null where the class has no object.
    """
    if predictions.get("kind") != KIND:
        return None
    shown = [key for key in _NUMBERS if any(key in row for row in predictions["classes"])]
    rows = sorted(predictions["classes"], key=lambda row: (-row["objects"], row["class"]))
    return {
        "step": predictions["step"],
        "images": predictions["images"],
        "heads": [key.replace("_", " ").replace("ap", "AP") for key in shown],
        "rows": [
            [
                _name(row["class"], names),
                _hex(row["class"]),
                row["objects"],
                row["found"],
                [row.get(key) for key in shown],
            ]
            for row in rows
        ],
        "absent": max(0, len(names) - len(rows)),
    }


def images(predictions: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
    """The worst and the best images; None where it is of another task, or shows none.

    Each has ``quality``, ``name``, ``picture``, its ``width`` and ``height``, and for ``truth`` and ``found`` the ``boxes`` (x, y, width, height, colour,
    text, whether it is drawn dashed) and the ``masks`` in colour, a data URL or null.
    """
    if predictions.get("kind") != KIND or not (predictions.get("worst") or predictions.get("best")):
        return None
    return {
        "step": predictions["step"],
        "averaged": predictions.get("averaged"),
        **{kind: [_image(item, names) for item in items] for kind, items in extremes(predictions).items()},
    }


def _image(item: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    with Image.open(io.BytesIO(_data(item["picture"]))) as picture:
        width, height = picture.size
    sides = {}
    for key in ("truth", "found"):
        masks = item.get(f"{key}_masks")
        sides[key] = {
            "boxes": list(_boxes(item[key], names)),
            "masks": None if masks is None else _coloured(masks, [each["class"] for each in item[key]]),
        }
    return {
        **{key: item[key] for key in ("name", "quality", "picture")},
        "width": width,
        "height": height,
        **sides,
    }


def _boxes(objects: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[list[Any]]:
    """A crowd, and what was found and is no object, is dashed."""
    for each in objects:
        text = _name(each["class"], names)
        if "score" in each:
            text += f" {each['score']:.0%}"
        elif each["crowd"]:
            text += ", crowd"
        dashed = each["crowd"] if "crowd" in each else not each["right"]
        yield [*each["box"], _hex(each["class"]), text, dashed]


def _coloured(masks: str, numbers: Sequence[int]) -> str:
    """A map of places in a list of objects, as a data URL of their classes' colours; clear where there is none."""
    table = np.zeros((256, 4), np.uint8)
    for place, number in enumerate(numbers[:255], 1):
        table[place] = (*colour(number), 255)
    with Image.open(io.BytesIO(_data(masks))) as image:
        return png_url(Image.fromarray(table[np.asarray(image)]))


def _data(url: str) -> bytes:
    return base64.b64decode(url.partition(",")[2])


def _name(number: int, names: Sequence[str]) -> str:
    return names[number] if number < len(names) else f"class {number}"


def _hex(number: int) -> str:
    return "#" + bytes(colour(number)).hex()
