"""A picture of a segmented image: the overlay, and below it the names, colours and shares of its classes."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from dattrain.palette import is_background, palette
from dattrain.pretrained.segment import Segmentation, Share
from dattrain.text import shortened

LISTED = 24
"""Classes at most; the rest are summed up."""
_NARROW = 240
"""Pixels that a legend has at least, whatever the image."""


def with_legend(found: Segmentation, *, listed: int = LISTED) -> Image.Image:
    """The overlay at the image's own size over its legend, the largest classes first; one without a colour is said to have none."""
    height, width = found.classes.shape
    size = max(12, min(64, width // 48))
    font = ImageFont.load_default(size)
    lines = _lines(found.shares(), listed)
    longest = max(round(font.getlength(text)) for _, text in lines) + 3 * size
    total = max(width, _NARROW, longest)
    columns = min(total // longest, len(lines))
    rows = -(-len(lines) // columns)
    step = round(1.5 * size)
    canvas = Image.new("RGB", (total, height + rows * step + size), "white")
    canvas.paste(Image.fromarray(found.overlay()), (0, 0))
    draw, colours = ImageDraw.Draw(canvas), palette(len(found.names))
    for place, (number, text) in enumerate(lines):
        x = place // rows * (total // columns) + size // 2
        y = height + place % rows * step + size // 2
        if number is not None:
            colour = None if is_background(found.names[number]) else tuple(map(int, colours[number]))
            draw.rectangle((x, y + size // 6, x + size, y + size // 6 + size), colour, "black")
        draw.text((x + round(1.5 * size), y), text, "black", font)
    return canvas


def _lines(shares: Sequence[Share], listed: int) -> list[tuple[int | None, str]]:
    """(class, text) of the largest, and of what is left."""
    lines: list[tuple[int | None, str]] = [
        (
            each.number,
            f"{shortened(each.name)}  {_percent(each.share)}{', no colour' * is_background(each.name)}",
        )
        for each in shares[:listed]
    ]
    if rest := shares[listed:]:
        lines.append((None, f"{len(rest)} more  {_percent(sum(each.share for each in rest))}"))
    return lines


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.0005 else "< 0.1 %"
