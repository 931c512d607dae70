"""Colours of classes, and maps of classes drawn over their images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_LEVELS = 24
"""Per channel of the colours that are chosen from."""
_TO_XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
)  # linear sRGB, IEC 61966-2-1
_WHITE = _TO_XYZ.sum(1)


@cache
def palette(classes: int) -> NDArray[np.uint8]:
    """``classes`` x 3 RGB, up to 255 of them; the colour of a class does not depend on how many there are.

    Each is the one farthest, in CIELAB, from those before it and from black, white and grey (Glasbey et al., "Colour displays for
    categorical images", Color Research and Application 2007), among colours of medium lightness and chroma: under a pure blue, say, a
    picture can no longer be made out.
    """
    steps = np.linspace(0, 255, _LEVELS).round().astype(np.uint8)
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    lab = _lab(candidates)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    shown = (lab[:, 0] > 40) & (lab[:, 0] < 88) & (chroma > 30) & (chroma < 75)
    candidates, lab = candidates[shown], lab[shown]
    taken = _lab(np.array([[0, 0, 0], [255, 255, 255], [128, 128, 128]], np.uint8))
    nearest = np.linalg.norm(lab[:, None] - taken, axis=2).min(1)
    chosen = np.empty((classes, 3), np.uint8)
    for number in range(classes):
        best = int(nearest.argmax())
        chosen[number] = candidates[best]
        nearest = np.minimum(nearest, np.linalg.norm(lab - lab[best], axis=1))
    chosen.setflags(write=False)
    return chosen


def is_background(name: str) -> bool:
    """Whether a class is called background (``_background_`` in labelme's sets): it is what no object covers, so it gets no colour."""
    return name.strip(" _").lower() == "background"


def overlay(
    pixels: NDArray[np.uint8], numbers: NDArray[np.uint8], names: Sequence[str], *, opacity: float = 0.5
) -> NDArray[np.uint8]:
    """An image under the colours of its classes; pixels of none (255) and of the background are left as they are.

    Args:
        pixels: H x W x 3.
        numbers: H x W, class indices.
        names: of all classes, by number.
        opacity: of the colours.

    Returns:
        H x W x 3.
    """
    # In 256ths, which 16 bits hold: photographs are large.
    part = round(256 * opacity)
    drawn = [number for number, name in enumerate(names) if not is_background(name)]
    table, weight = np.full((256, 3), 128, np.uint16), np.full((256, 1), 256, np.uint16)
    table[drawn] += np.uint16(part) * palette(len(names))[drawn]
    weight[drawn] -= np.uint16(part)
    mixed: NDArray[np.uint16] = weight[numbers] * pixels
    mixed += table[numbers]
    mixed >>= 8
    return mixed.astype(np.uint8)


def map_image(numbers: NDArray[np.uint8], names: Sequence[str] = ()) -> Image.Image:
    """H x W class numbers as an image of these numbers with a palette (mode P): void (255) is grey, the background transparent.

    Args:
        names: of the classes, by number; without them none is the background.
    """
    colours = np.full((256, 4), 255, np.uint8)
    colours[:255, :3] = palette(255)
    colours[255, :3] = 128
    colours[[number for number, name in enumerate(names) if is_background(name)], 3] = 0
    image = Image.fromarray(np.ascontiguousarray(numbers), mode="P")
    image.putpalette(colours.tobytes(), "RGBA")
    return image


def _lab(colours: NDArray[np.uint8]) -> NDArray[np.float64]:
    """N x 3 sRGB to N x 3 CIELAB under D65."""
    c = colours / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    t = linear @ _TO_XYZ.T / _WHITE
    x, y, z = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)
