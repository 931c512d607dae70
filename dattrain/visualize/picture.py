"""An image as it is drawn: the whole picture at its own resolution, and the window of it that the network saw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from dattrain.data.augment.dense_plan import resized_size
from dattrain.data.augment.plan import eval_geometry, source_edges
from dattrain.pretrained import preprocess
from dattrain.pretrained.pretrained_cfg import PretrainedCfg
from dattrain.visualize.sampling_points import Deformed

LONGEST = 1600
"""Pixels of a side that is drawn; a larger picture is scaled down."""


@dataclass(frozen=True)
class Picture:
    """``pixels``: H x W x 3 uint8. ``window``: top, left, height and width of what the network saw, in these pixels.

    The window of a detector is larger than the picture, by the padding at its right and at its bottom.
    """

    pixels: np.ndarray
    window: tuple[float, float, float, float]

    @property
    def whole(self) -> bool:
        """The network saw all of it."""
        top, left, height, width = self.window
        return (top, left) == (0, 0) and height >= self.pixels.shape[0] and width >= self.pixels.shape[1]

    @property
    def padded(self) -> bool:
        """The network saw more than there is to see."""
        return self.whole and self.window[2:] != self.pixels.shape[:2]

    def within(self, point: tuple[float, float]) -> tuple[float, float]:
        """(y, x) as fractions of what the network saw, from fractions of that without padding."""
        if not self.padded:
            return point
        height, width = self.pixels.shape[:2]
        return point[0] * height / self.window[2], point[1] * width / self.window[3]

    def place(self, block: Deformed, points: np.ndarray) -> np.ndarray:
        """Normalised (y, x) points of a block in pixels of the picture, whose centres are at .5."""
        placed: np.ndarray = block.pixels(points, self.window[2:]) + np.asarray(self.window[:2])  # type: ignore[arg-type]
        return placed


def as_picture(image: np.ndarray | Picture) -> Picture:
    """An array (H x W x 3 uint8) is a picture that the network saw all of."""
    if isinstance(image, Picture):
        return image
    return Picture(image, (0, 0, *image.shape[:2]))


def picture_of(image: Tensor, cfg: PretrainedCfg) -> Picture:
    """The picture of an image (3 x H x W uint8) that ``preprocess.prepare`` prepares for a model."""
    sides = height, width = image.shape[1:]
    if cfg.sides is not None:
        rows, columns = resized_size(height, width, short_side=cfg.sides[0], long_side=cfg.sides[1])
        padded = preprocess.padded_size(rows, columns, cfg)
        (top, left), (bottom, right) = (0.0, 0.0), (height * padded[0] / rows, width * padded[1] / columns)
    else:
        resized, corner = eval_geometry(height, width, cfg.img_size, resize=cfg.resize, crop_pct=cfg.crop_pct)
        (top, left), (bottom, right) = source_edges(sides, resized, corner, cfg.img_size)
    pixels, scale = preprocess.array(image), min(1.0, LONGEST / max(sides))
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        pixels = np.asarray(
            Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.LANCZOS)
        )
    y, x = pixels.shape[0] / height, pixels.shape[1] / width
    return Picture(pixels, (top * y, left * x, (bottom - top) * y, (right - left) * x))
