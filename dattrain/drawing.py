"""Objects drawn over their image: boxes and masks in the colours of their classes, with a few words each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dattrain.palette import palette

_COLOURS = 255
"""As many as a palette has; classes beyond begin again."""


@dataclass(frozen=True)
class Shape:
    """An object to draw.

    Attributes:
        box: left, top, right and bottom edge in pixels; fractions and places outside the image are fine.
        number: of its class, from 0.
        text: what stands at its box; nothing where it is empty.
        mask: bool, of a part of the image; None draws the box alone.
        corner: top and left pixel of that part.
    """

    box: tuple[float, float, float, float]
    number: int
    text: str = ""
    mask: NDArray[np.bool_] | None = None
    corner: tuple[int, int] = (0, 0)


def colour(number: int) -> tuple[int, int, int]:
    """RGB of a class."""
    red, green, blue = palette(_COLOURS)[number % _COLOURS].tolist()
    return red, green, blue


def draw(
    pixels: NDArray[np.uint8], shapes: Iterable[Shape], *, opacity: float = 0.5, text: bool = True
) -> NDArray[np.uint8]:
    """An image with objects over it, the first on top; lines and letters are as large as the image asks for.

    Args:
        pixels: H x W x 3.
        opacity: of the masks.
        text: whether the objects' words are drawn.

    Returns:
        H x W x 3; ``pixels`` stay as they are.
    """
    below_first = list(shapes)[::-1]
    drawn = pixels.copy()
    part = round(256 * opacity)
    for shape in below_first:
        if shape.mask is not None:
            top, left = shape.corner
            height, width = shape.mask.shape
            region = drawn[top : top + height, left : left + width]
            # In 256ths, which 16 bits hold.
            own = part * np.array(colour(shape.number), np.uint16) + 128
            region[shape.mask] = ((256 - part) * region[shape.mask].astype(np.uint16) + own) >> 8
    longest = max(drawn.shape[:2])
    line, size = max(1, round(longest / 320)), max(10, min(64, longest // 50))
    image = Image.fromarray(drawn)
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    for shape in below_first:
        canvas.rectangle(_pixels(shape.box, image.size), outline=colour(shape.number), width=line)
    for shape in below_first:
        if text and shape.text:
            _label(canvas, font, shape, image.size, line)
    return np.asarray(image)


def _label(
    canvas: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    shape: Shape,
    size: tuple[int, int],
    line: int,
) -> None:
    """Words on a plate above the box, or within it where there is no room above; moved into the image at its right."""
    left, top, _, _ = _pixels(shape.box, size)
    x0, y0, x1, y1 = canvas.textbbox((0, 0), shape.text, font)
    width, height = x1 - x0 + 2 * line + 2, y1 - y0 + 2 * line + 2
    x, y = max(0, min(left, size[0] - round(width))), top - round(height)
    if y < 0:
        y = top
    plate = colour(shape.number)
    canvas.rectangle((x, y, x + width, y + height), plate)
    light = 0.299 * plate[0] + 0.587 * plate[1] + 0.114 * plate[2] > 140
    canvas.text((x + line + 1 - x0, y + line + 1 - y0), shape.text, "black" if light else "white", font)


def _pixels(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The outermost pixels of a box, within an image of that width and height."""
    (left, right), (top, bottom) = (
        (min(max(int(low), 0), side - 1), min(max(int(np.ceil(high)) - 1, 0), side - 1))
        for low, high, side in ((box[0], box[2], size[0]), (box[1], box[3], size[1]))
    )
    return left, top, max(left, right), max(top, bottom)
