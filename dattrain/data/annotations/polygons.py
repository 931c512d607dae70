"""Which pixels a polygon covers, by COCO's own rule, so that masks and areas are those that its evaluation has."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SCALE = 5


def paint(mask: NDArray[np.bool_], polygon: NDArray[np.float64], corner: tuple[int, int] = (0, 0)) -> None:
    """Add a polygon's pixels to a mask, in place.

    The rule of the COCO API (``rleFrPoly`` in ``maskApi.c``): corners are rounded to a grid five times as fine, edges are walked on it a
    step at a time along their longer side, and a column's pixels change where the boundary crosses its middle.

    Args:
        mask: H x W.
        polygon: K x 2 corners, x and y in pixels; the last one is joined to the first.
        corner: top and left of the mask in the image that the polygon is of, where it is a part of that alone.
    """
    height, width = mask.shape
    corners = np.trunc(_SCALE * polygon + 0.5).astype(np.int64)
    u, v = _boundary(corners, np.roll(corners, -1, axis=0))
    # After rounding, so that a part of an image is the same to the pixel.
    u, v = u - _SCALE * corner[1], v - _SCALE * corner[0]
    step = np.flatnonzero(u[1:] != u[:-1]) + 1
    after, before = u[step], u[step - 1]
    x = (np.where(after < before, after, after - 1) + 0.5) / _SCALE - 0.5
    y = (np.where(v[step] < v[step - 1], v[step], v[step - 1]) + 0.5) / _SCALE - 0.5
    inside = (np.floor(x) == x) & (x >= 0) & (x <= width - 1)
    columns, rows = x[inside].astype(np.int64), np.ceil(y[inside].clip(0, height)).astype(np.int64)
    if not len(columns):
        return
    # A closed curve crosses each column an even number of times, so nothing outside of these columns changes.
    left, right = int(columns.min()), int(columns.max()) + 1
    changes = np.bincount((columns - left) * height + rows, minlength=(right - left) * height + 1)
    odd = (np.cumsum(changes[:-1]) & 1).astype(np.bool_)
    mask[:, left:right] |= odd.reshape(right - left, height).T


def _boundary(
    start: NDArray[np.int64], end: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Points of all edges, of both ends of each, in order."""
    span = np.abs(end - start)
    steps = span.max(axis=1)
    flat = span[:, 0] >= span[:, 1]
    long = np.where(flat, 0, 1)
    edge = np.arange(len(start))
    # An edge is walked from its lower end on the longer side, and its points turned around where it runs the other way.
    flip = start[edge, long] > end[edge, long]
    low, high = np.where(flip[:, None], end, start), np.where(flip[:, None], start, end)
    slope = (high - low)[edge, 1 - long] / np.maximum(steps, 1)
    of = np.repeat(edge, steps + 1)
    first = np.concatenate(([0], np.cumsum(steps + 1)[:-1]))
    at = np.arange(len(of)) - first[of]
    at = np.where(flip[of], steps[of] - at, at)
    along = low[of, long[of]] + at
    across = np.trunc(low[of, 1 - long[of]] + slope[of] * at + 0.5).astype(np.int64)
    return np.where(flat[of], along, across), np.where(flat[of], across, along)


def area(polygon: NDArray[np.float64]) -> float:
    """Area of a polygon without crossings, in squares of pixels; ``polygon`` as for ``paint``."""
    x, y = (polygon - polygon[0]).T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)
