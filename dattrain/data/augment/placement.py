"""Where the pixels of a stored image come to lie in training: one crop, one resize, one more crop and perhaps a flip."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Placement:
    """From a stored image to what is made of it.

    Attributes:
        box: top, left, height and width of the part that is taken, in stored pixels.
        size: height and width that it is resized to.
        rows, columns: of the resized part, those that are kept.
        flip: left to right, after all.
    """

    box: tuple[int, int, int, int]
    size: tuple[int, int]
    rows: slice
    columns: slice
    flip: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the result."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def seen(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of what is in the result, in stored pixels."""
        top, left, height, width = self.box
        y, x = height / self.size[0], width / self.size[1]
        return (
            left + self.columns.start * x,
            top + self.rows.start * y,
            left + self.columns.stop * x,
            top + self.rows.stop * y,
        )

    def cut(self, height: int, width: int) -> Placement:
        """What of the result lies within that height and width, from its upper left corner."""
        own = self.shape
        rows = slice(self.rows.start, self.rows.start + min(height, own[0]))
        width = min(width, own[1])
        if self.flip:
            columns = slice(self.columns.stop - width, self.columns.stop)
        else:
            columns = slice(self.columns.start, self.columns.start + width)
        return replace(self, rows=rows, columns=columns)

    def boxes(self, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Where boxes (N x 4: left, top, right, bottom in stored pixels) lie in the result; none is clipped."""
        top, left, height, width = self.box
        scale = np.array([self.size[1] / width, self.size[0] / height] * 2)
        placed: NDArray[np.float64] = (boxes - [left, top, left, top]) * scale
        placed -= [self.columns.start, self.rows.start] * 2
        if self.flip:
            placed[:, [0, 2]] = self.shape[1] - placed[:, [2, 0]]
        return placed

    def sources(self, rows: slice, columns: slice) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row and column of the stored pixel that holds the centre of each of these rows and columns of the result."""
        top, left, height, width = self.box
        y = np.arange(rows.start, rows.stop) + self.rows.start
        x = np.arange(columns.start, columns.stop)
        x = self.columns.stop - 1 - x if self.flip else self.columns.start + x
        # In whole numbers, as ``dense_transforms.nearest``.
        return (
            top + (2 * y + 1) * height // (2 * self.size[0]),
            left + (2 * x + 1) * width // (2 * self.size[1]),
        )
