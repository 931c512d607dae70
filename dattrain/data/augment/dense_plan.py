"""What is drawn for images of dense prediction: scale, crop, flip and photometric distortion, as small arrays on the CPU.

A sample's draws are a function of (seed, stream, position) alone, as in ``plan``: so is what it looks like in training, whoever
trains on it, and in whatever micro-batch where ``geometry.crop`` says a size. The pixels are ``dense_transforms``' business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dattrain.config.data_sections import Augment, Geometry
from dattrain.config.values import as_pair
from dattrain.data.philox import Stream, uniform

ATTEMPTS = 10
"""Places drawn for a crop."""
_BRIGHTNESS = 32.0
_FACTOR = (0.5, 1.5)
_HUE = 36.0


@dataclass(frozen=True)
class DensePlan:
    """The drawn augmentation of B samples.

    Attributes:
        short_side, long_side: of ``resized_size``, before ``scale``.
        crop: (height, width) of the result; None takes the whole image.
        max_class_share: of a crop's labelled pixels, see ``dense_transforms.choose_crop``.
        interpolation: of images, ``bilinear`` or ``bicubic``. Maps take the nearest pixel.
        scale: B float64, factor of both sides.
        place: B x 10 x 2 float64 in (0, 1): where a crop begins, of the room from the top and from the left.
        flip: B bool, left to right.
        brightness: B float32, added to values of 0 to 255; 0 leaves as it is.
        contrast, saturation: B float32, factors of the values and of HSV's saturation; 1 leaves as it is.
        hue: B float32, degrees of 360; 0 leaves as it is.
        contrast_first: B bool: contrast comes before saturation and hue, else after.
    """

    short_side: int
    long_side: int
    crop: tuple[int, int] | None
    max_class_share: float
    interpolation: str
    scale: NDArray[np.float64]
    place: NDArray[np.float64]
    flip: NDArray[np.bool_]
    brightness: NDArray[np.float32]
    contrast: NDArray[np.float32]
    saturation: NDArray[np.float32]
    hue: NDArray[np.float32]
    contrast_first: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.flip)

    def resized(self, sample: int, height: int, width: int) -> tuple[int, int]:
        """Height and width of sample ``sample``, as it is stored, after its resize."""
        return resized_size(
            height,
            width,
            short_side=self.short_side,
            long_side=self.long_side,
            scale=float(self.scale[sample]),
        )


def draw(geometry: Geometry, augment: Augment, seed: int, positions: ArrayLike) -> DensePlan:
    """Draw the plan of the samples at ``positions`` (B int64, global).

    The distortion is that of SSD (Liu et al., ECCV 2016, section 2.2 and its code) with the constants of mmseg's
    PhotoMetricDistortion: each of four happens with probability 1/2, brightness by up to +-32 of 255, contrast and saturation
    by factors of .5 to 1.5, hue by up to +-36 degrees (18 of OpenCV's 180). mmseg draws hue in whole steps of 2 degrees.
    """
    at = np.asarray(positions, dtype=np.int64)
    low, high = geometry.scale
    happens, amount = np.split(uniform(seed, Stream.DISTORTION, at, 9), (5,), axis=1)
    on = (happens[:, :4] < 0.5) & geometry.distortion

    def drawn(which: int, low: float, high: float, neutral: float) -> NDArray[np.float32]:
        values = low + amount[:, which] * (high - low)
        return np.where(on[:, which], values, neutral).astype(np.float32)

    return DensePlan(
        short_side=geometry.short_side,
        long_side=geometry.long_side,
        crop=None if geometry.crop is None else as_pair(geometry.crop),
        max_class_share=geometry.max_class_share,
        interpolation=augment.interpolation,
        scale=low + uniform(seed, Stream.DENSE_SCALE, at, 1)[:, 0] * (high - low),
        place=uniform(seed, Stream.DENSE_CROP, at, 2 * ATTEMPTS).reshape(len(at), ATTEMPTS, 2),
        flip=uniform(seed, Stream.DENSE_FLIP, at, 1)[:, 0] < augment.hflip,
        brightness=drawn(0, -_BRIGHTNESS, _BRIGHTNESS, 0.0),
        contrast=drawn(1, *_FACTOR, 1.0),
        saturation=drawn(2, *_FACTOR, 1.0),
        hue=drawn(3, -_HUE, _HUE, 0.0),
        contrast_first=happens[:, 4] < 0.5,
    )


def resized_size(
    height: int, width: int, *, short_side: int, long_side: int, scale: float = 1.0
) -> tuple[int, int]:
    """Height and width of an image after the resize of training and evaluation, which keeps the ratio.

    The rule of mmcv's ``imrescale`` and mmseg's ``Resize``: both limits times ``scale``, cut to whole pixels; the largest factor
    that keeps the shorter side within ``short_side`` and the longer within ``long_side``; sides rounded. At least one pixel.
    """
    short, long = int(short_side * scale), int(long_side * scale)
    if short > long:
        short, long = long, short
    factor = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def crop_window(size: tuple[int, int], crop: tuple[int, int], place: Sequence[float]) -> tuple[slice, slice]:
    """Rows and columns of a crop of an image of ``size``, all of a side that has no more; ``place`` are two draws from (0, 1)."""
    windows = []
    for side, wanted, u in zip(size, crop, place):
        free = max(side - wanted, 0)
        # A draw is below 1, but times a whole number it may round up to that number.
        start = min(int(u * (free + 1)), free)
        windows.append(slice(start, min(start + wanted, side)))
    return windows[0], windows[1]
