"""The objects of an image where its ``Placement`` puts them: boxes, and masks, one at a time and never larger than the object's own box."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dattrain.data.annotations import segmentations
from dattrain.data.annotations.instances import Instances
from dattrain.data.augment.placement import Placement
from dattrain.data.detection_batch import GRID

_LEAST = 1.0
"""Pixels of a side."""


@dataclass(frozen=True)
class PlacedObjects:
    """Those N objects of an image that are seen in what its placement makes of it.

    Attributes:
        objects: of the stored image.
        size: of that, height and width.
        placement: where it comes to lie.
        index: N int64, which of ``objects`` they are.
        stored: N x 4 float64: left, top, right and bottom of what is seen of each box, in stored pixels.
        boxes: N x 4 float64, the same in the result.
    """

    objects: Instances
    size: tuple[int, int]
    placement: Placement
    index: NDArray[np.int64]
    stored: NDArray[np.float64]
    boxes: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> NDArray[np.int64]:
        """N int64."""
        return self.objects.classes[self.index]

    def coverage(self, number: int) -> NDArray[np.uint8]:
        """G x G: how much of each cell of a grid over the box of an object its mask covers, see ``coverage``.

        The mask is made at its stored size, where it is what evaluation compares with, and reduced once.
        """
        left, top, right, bottom = self.stored[number].tolist()
        rows, columns = _around(top, bottom, self.size[0]), _around(left, right, self.size[1])
        mask = self._mask(number, rows, columns)
        found = coverage(
            mask, (left - columns.start, top - rows.start, right - columns.start, bottom - rows.start)
        )
        return found[:, ::-1] if self.placement.flip else found

    def pixels(self, number: int) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
        """Rows and columns of the result that hold the box of an object, and which pixels of these are the object's: bool."""
        window = self.window(number)
        y, x = self.placement.sources(*window)
        rows, columns = (slice(int(at.min()), int(at.max()) + 1) for at in (y, x))
        mask = self._mask(number, rows, columns)
        return window, mask[(y - rows.start)[:, None], (x - columns.start)[None, :]]

    def window(self, number: int) -> tuple[slice, slice]:
        """Rows and columns of the result that hold the box of an object."""
        left, top, right, bottom = self.boxes[number].tolist()
        height, width = self.placement.shape
        return _around(top, bottom, height), _around(left, right, width)

    def _mask(self, number: int, rows: slice, columns: slice) -> NDArray[np.bool_]:
        """A part of an object's mask, in stored pixels."""
        segmentation = self.objects.segmentations[self.index[number]]
        assert segmentation is not None  # ``annotations.detection.detected`` was asked for masks
        return segmentations.mask(segmentation, self.size, "", (rows, columns))


def place(objects: Instances, size: tuple[int, int], placement: Placement) -> PlacedObjects:
    """The objects of a stored image (height and width ``size``) in what its placement makes of it.

    Boxes are clipped to the result. Left out are objects of which less than a pixel a side is left (mmdetection's RandomCrop leaves
    out those of no area).
    """
    x, y, width, height = objects.boxes.T
    left, top, right, bottom = placement.seen
    stored = np.stack(
        (
            np.clip(x, left, right),
            np.clip(y, top, bottom),
            np.clip(x + width, left, right),
            np.clip(y + height, top, bottom),
        ),
        axis=1,
    )
    boxes = placement.boxes(stored)
    result = placement.shape
    boxes = np.clip(boxes, 0, [result[1], result[0], result[1], result[0]])
    large = (boxes[:, 2:] - boxes[:, :2] >= _LEAST).all(axis=1)
    index = np.flatnonzero(large)
    return PlacedObjects(objects, size, placement, index, stored[index], boxes[index])


def coverage(
    mask: NDArray[np.bool_], box: tuple[float, float, float, float], cells: int = GRID
) -> NDArray[np.uint8]:
    """How much of each cell of a grid over a box a mask covers, by area: ``cells`` x ``cells``, 255 being all.

    Args:
        mask: H x W.
        box: left, top, right and bottom in pixels of the mask; within it.
    """
    left, top, right, bottom = box
    rows = _areas(mask, top, bottom, cells)
    found = _areas(rows.T, left, right, cells).T
    share = found * np.float32(255.0 * cells * cells / ((bottom - top) * (right - left)))
    whole: NDArray[np.uint8] = np.rint(share.clip(0, 255)).astype(np.uint8)
    return whole


def _areas(
    values: NDArray[np.bool_] | NDArray[np.float32], low: float, high: float, cells: int
) -> NDArray[np.float32]:
    """Integrals along the first axis, over equal cells from ``low`` to ``high``, of values that are constant within a pixel."""
    edges = np.linspace(low, high, cells + 1)
    at = np.minimum(edges.astype(np.int64), len(values) - 1)
    part = (edges - at).astype(np.float32)[:, None]
    sums = np.zeros((len(values) + 1, values.shape[1]), dtype=np.float32)
    np.cumsum(values, axis=0, out=sums[1:])
    return np.diff(sums[at] + part * values[at], axis=0)


def _around(low: float, high: float, most: int) -> slice:
    """The whole pixels that hold an interval; at least one, of ``most``."""
    start = min(int(low), most - 1)
    return slice(start, min(max(math.ceil(high), start + 1), most))
