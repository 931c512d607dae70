"""The bias of a block of queries, and its gradients, from coordinates that are separable by axis.

Table index of key k and query row i: ``start[k] + i * step`` along each axis (``dattrain.ops.deformable_attention.coordinates``). Two ways:

- ``Windows``: a query step is exactly one cell (DAT++'s convention, table 2H-1), so the fractions of a key are the same
  for all queries, and its bias is a blend of four H x W windows of the table.
- ``Rows``, for any step: along y every (key, query row) blends two rows of the table; along x a small matrix per key,
  with two hat weights in every column, does the rest.

Both gather with ``embedding_bag``, which on CPUs is far faster than index_select or grid_sample. Gradients of the table are
the same gather turned round: the taps are sorted by where they read, so every table entry is one bag (no atomics, and
the same result each time).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dattrain.ops.deformable_attention.coordinates import QueryGrid, start_and_step


class BlockBias(Protocol):
    """Bias of one block: c images, the heads of a group, some query rows."""

    def forward(self, into: Tensor) -> Tensor:
        """Bias, c x Ns x heads x queries; in ``into`` or in fresh memory."""
        ...

    def backward(self, grad: Tensor) -> Tensor:
        """From the gradient of ``forward``'s result, that of the positions, c x Ns x 2; the table's is accumulated."""
        ...


def bias_builder(
    table: Tensor, positions: Tensor, height: int, width: int, rows: slice, grid: QueryGrid
) -> Builder:
    """The cheaper way for this table (heads x Th x Tw), all positions of the group (B x Ns x 2) and these query rows."""
    y = _Axis(height, table.shape[1], grid, rows.start)
    x = _Axis(width, table.shape[2], grid, 0)
    n_rows = rows.stop - rows.start
    if y.whole_steps(n_rows) and x.whole_steps(width):
        windows = Windows(table, positions, y, x, n_rows, width)
        if windows.count <= 4 * positions.shape[0] * positions.shape[1]:
            return windows
    return Rows(table, positions, y, x, n_rows, width)


class _Axis:
    """Table index along one axis: ``origin + slope * position + step * i`` for the block's i-th query row."""

    def __init__(self, size: int, table_size: int, grid: QueryGrid, first: int) -> None:
        start, self.slope, self.step = start_and_step(size, table_size, grid)
        self.origin = start + first * self.step
        self.table_size = table_size

    def whole_steps(self, queries: int) -> bool:
        return queries == 1 or self.step == 1.0

    def start(self, positions: Tensor) -> Tensor:
        # What is not finite becomes NaN, not a place far outside, where a diverged offset would go unseen.
        return positions * self.slope + self.origin + (positions - positions)


def _floor(index: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Integer part, clamped to where nothing but padding is read, and fraction (before clamping)."""
    floor = index.floor()
    return floor.to(torch.int64).clamp_(low, high), index - floor


def _range(index: Tensor, low: int, high: int) -> tuple[int, int]:
    """Smallest and largest entry; the bounds themselves where reading would make an accelerator wait."""
    if index.device.type != "cpu" or index.numel() == 0:
        return low, high
    least, most = torch.aminmax(index)
    return int(least), int(most)


def _by_bag(bags: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The order that sorts taps by the bag (below ``count``) that each reads, and where in it every bag begins."""
    if bags.device.type == "cpu" and count <= 1 << 16:
        # numpy sorts 16-bit numbers by radix, many times faster than torch compares.
        order = torch.from_numpy(np.argsort(bags.numpy().astype(np.uint16), kind="stable"))
    else:
        order = torch.argsort(bags, stable=True)
    ends = torch.bincount(bags, minlength=count).cumsum(0)
    return order, F.pad(ends[:-1], (1, 0))


class Builder(ABC):
    """What the blocks of one group and the same query rows share: the table (heads x Th x Tw), cut into windows once."""

    def __init__(self, table: Tensor, y: _Axis, x: _Axis, height: int, width: int) -> None:
        self.shape = table.shape
        self.y, self.x, self.height, self.width = y, x, height, width
        self._table = table
        self._windows: Tensor | None = None
        self._gradient: Tensor | None = None

    @abstractmethod
    def block(self, positions: Tensor) -> BlockBias:
        """For c images with positions c x Ns x 2."""

    def accumulate(self, gradient: Tensor) -> None:
        """Add a block's gradient of ``windows``."""
        self._gradient = gradient if self._gradient is None else self._gradient.add_(gradient)

    def table_gradient(self) -> Tensor:
        """Sum over the blocks so far, heads x Th x Tw."""
        full = self._table.new_zeros(self.shape)
        return full if self._gradient is None else self._folded(self._gradient, full)

    @abstractmethod
    def _folded(self, gradient: Tensor, full: Tensor) -> Tensor:
        """The gradient of ``windows`` as that of the table, in ``full``."""


class Windows(Builder):
    """Bias where a query step is one table cell: four windows of the table per key."""

    def __init__(self, table: Tensor, positions: Tensor, y: _Axis, x: _Axis, height: int, width: int) -> None:
        super().__init__(table, y, x, height, width)
        self.y_range = _range(self.starts(positions[..., 0], y, height)[0], -height - 1, table.shape[1])
        self.x_range = _range(self.starts(positions[..., 1], x, width)[0], -width - 1, table.shape[2])
        # Windows begin at each start and one further, for the second tap.
        self.counts = (self.y_range[1] - self.y_range[0] + 2, self.x_range[1] - self.x_range[0] + 2)

    @staticmethod
    def starts(positions: Tensor, axis: _Axis, size: int) -> tuple[Tensor, Tensor]:
        """First table entry of each key's window, and the fraction."""
        return _floor(axis.start(positions), -size - 1, axis.table_size)

    @property
    def count(self) -> int:
        """Windows in memory, per head."""
        return self.counts[0] * self.counts[1]

    def windows(self) -> Tensor:
        """Every window in range, count x (heads * height * width)."""
        if self._windows is None:
            (y0, y1), (x0, x1) = self.y_range, self.x_range
            padded = _crop(self._table, y0, y1 + 1 + self.height, x0, x1 + 1 + self.width)
            views = padded.unfold(1, self.height, 1).unfold(2, self.width, 1).permute(1, 2, 0, 3, 4)
            self._windows = views.reshape(self.count, -1)
        return self._windows

    def block(self, positions: Tensor) -> _WindowsBlock:
        """What an image and its keys need, for positions c x Ns x 2."""
        return _WindowsBlock(self, positions)

    def _folded(self, gradient: Tensor, full: Tensor) -> Tensor:
        (y0, y1), (x0, x1) = self.y_range, self.x_range
        size = (y1 + 1 + self.height - y0, x1 + 1 + self.width - x0)
        # To fold, the window is the grid of places, and the starts are what slides.
        columns = gradient.view(self.count, self.shape[0], -1).transpose(0, 1)
        return _uncrop(F.fold(columns, size, self.counts).squeeze(1), y0, x0, full)


class _WindowsBlock:
    def __init__(self, shared: Windows, positions: Tensor) -> None:
        self.shared, self.images, self.keys = shared, positions.shape[0], positions.shape[1]
        start_y, fy = shared.starts(positions[..., 0], shared.y, shared.height)
        start_x, fx = shared.starts(positions[..., 1], shared.x, shared.width)
        columns = shared.counts[1]
        first = (start_y - shared.y_range[0]) * columns + (start_x - shared.x_range[0])
        self.bags = torch.stack([first, first + 1, first + columns, first + columns + 1], -1).view(-1, 4)
        gy, gx = 1 - fy, 1 - fx
        self.weights = torch.stack([gy * gx, gy * fx, fy * gx, fy * fx], -1).view(-1, 4)
        self.along_y = torch.stack([-gx, -fx, gx, fx], -1).view(-1, 4)
        self.along_x = torch.stack([-gy, gy, -fy, fy], -1).view(-1, 4)

    def _blend(self, weights: Tensor) -> Tensor:
        return F.embedding_bag(self.bags, self.shared.windows(), mode="sum", per_sample_weights=weights)

    def forward(self, into: Tensor) -> Tensor:
        return self._blend(self.weights).view(into.shape)

    def backward(self, grad: Tensor) -> Tensor:
        grad = grad.view(self.images * self.keys, -1)
        y = self._blend(self.along_y).mul_(grad).sum(-1).mul_(self.shared.y.slope)
        x = self._blend(self.along_x).mul_(grad).sum(-1).mul_(self.shared.x.slope)
        rows = torch.arange(self.images * self.keys, device=grad.device).repeat_interleave(4)
        order, offsets = _by_bag(self.bags.view(-1), self.shared.count)
        self.shared.accumulate(
            F.embedding_bag(
                rows[order], grad, offsets, mode="sum", per_sample_weights=self.weights.view(-1)[order]
            )
        )
        return torch.stack([y, x], -1).view(self.images, self.keys, 2)


class Rows(Builder):
    """Bias for any step: two table rows per key and query row, then hat weights per key along x."""

    def __init__(self, table: Tensor, positions: Tensor, y: _Axis, x: _Axis, height: int, width: int) -> None:
        super().__init__(table, y, x, height, width)
        self.length = _comfortable(math.ceil(x.step * (width - 1)) + 2)
        """Columns of the table that the queries of one key can touch."""
        self.x_range = _range(self.starts_x(positions[..., 1])[0], -self.length, table.shape[2])
        self.starts = self.x_range[1] - self.x_range[0] + 1
        self.table_rows = table.shape[1] + 4

    def starts_x(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Column where each key's window starts, clamped and rounded down, and exactly."""
        start = self.x.start(positions)
        floor, _ = _floor(start, -self.length, self.shape[2])
        return floor, start

    @property
    def count(self) -> int:
        """Row windows in memory, per head."""
        return self.table_rows * self.starts

    def windows(self) -> Tensor:
        """Every table row, with two rows of zeros around, from every start, (heads * count) x length."""
        if self._windows is None:
            x0, x1 = self.x_range
            padded = _crop(self._table, -2, self.shape[1] + 2, x0, x1 + self.length)
            self._windows = padded.unfold(2, self.length, 1).reshape(-1, self.length)
        return self._windows

    def block(self, positions: Tensor) -> _RowsBlock:
        """What an image and its keys need, for positions c x Ns x 2."""
        return _RowsBlock(self, positions)

    def _folded(self, gradient: Tensor, full: Tensor) -> Tensor:
        heads = self.shape[0]
        gradient = gradient.view(heads, self.table_rows, self.starts, self.length)
        summed = gradient.new_zeros(heads, self.table_rows, self.starts + self.length - 1)
        for column in range(self.length):
            summed[:, :, column : column + self.starts] += gradient[..., column]
        return _uncrop(summed, -2, self.x_range[0], full)


class _RowsBlock:
    def __init__(self, shared: Rows, positions: Tensor) -> None:
        self.shared, self.images, self.keys = shared, positions.shape[0], positions.shape[1]
        device, dtype = positions.device, positions.dtype
        steps = torch.arange(shared.height, device=device, dtype=dtype) * shared.y.step
        row, self.fy = _floor(shared.y.start(positions[..., 0]).unsqueeze(-1) + steps, -2, shared.shape[1])
        start, exact = shared.starts_x(positions[..., 1])
        self.bags = (row + 2) * shared.starts + (start - shared.x_range[0]).unsqueeze(-1)
        steps = torch.arange(shared.width, device=device, dtype=dtype) * shared.x.step
        # Column of the key's own window that each query column reads.
        self.column = ((exact - start).unsqueeze(-1) + steps).view(-1, 1, shared.width)
        self.rows: Tensor | None = None
        self.hats: Tensor | None = None

    def _blend(self, first: Tensor, second: Tensor) -> Tensor:
        """Weights c x Ns x height of the two rows to (c * Ns) x (heads * height) x length."""
        shared = self.shared
        heads = shared.shape[0]
        taps = torch.stack([self.bags, self.bags + shared.starts], -1).unsqueeze(2)
        offset = torch.arange(heads, device=taps.device).view(1, 1, heads, 1, 1) * shared.count
        weights = torch.stack([first, second], -1).unsqueeze(2).expand(-1, -1, heads, -1, -1).reshape(-1, 2)
        rows = F.embedding_bag(
            (taps + offset).view(-1, 2), shared.windows(), mode="sum", per_sample_weights=weights
        )
        return rows.view(self.images * self.keys, heads * shared.height, shared.length)

    def forward(self, into: Tensor) -> Tensor:
        shared = self.shared
        columns = torch.arange(shared.length, device=into.device, dtype=into.dtype).view(1, -1, 1)
        self.rows = self._blend(1 - self.fy, self.fy)
        self.hats = (self.column - columns).abs_().neg_().add_(1).clamp_(min=0)
        torch.bmm(self.rows, self.hats, out=into.view(self.images * self.keys, -1, shared.width))
        return into

    def backward(self, grad: Tensor) -> Tensor:
        assert self.rows is not None and self.hats is not None
        shared = self.shared
        heads = shared.shape[0]
        grad = grad.view(self.images * self.keys, heads * shared.height, shared.width)
        # A hat falls by as much at its floor as it rises at the next column.
        grad_hats = torch.bmm(grad.transpose(1, 2), self.rows)
        floor = self.column.transpose(1, 2).to(torch.int64).clamp_(0, shared.length - 2)
        rise = grad_hats.gather(2, floor + 1).sub_(grad_hats.gather(2, floor))
        x = rise.sum((1, 2)).mul_(shared.x.slope)
        grad_rows = torch.bmm(grad, self.hats.transpose(1, 2))
        one = torch.ones_like(self.fy)
        y = self._blend(-one, one).mul_(grad_rows).sum((1, 2)).mul_(shared.y.slope)
        self._accumulate(grad_rows.view(-1, shared.length))
        return torch.stack([y, x], -1).view(self.images, self.keys, 2)

    def _accumulate(self, grad_rows: Tensor) -> None:
        shared = self.shared
        heads, device = shared.shape[0], grad_rows.device
        bags = torch.stack([self.bags, self.bags + shared.starts], -1).view(-1)
        order, offsets = _by_bag(bags, shared.count)
        weights = torch.stack([1 - self.fy, self.fy], -1).view(-1)[order]
        key = torch.arange(self.images * self.keys, device=device).unsqueeze(1) * (heads * shared.height)
        places = (key + torch.arange(shared.height, device=device)).view(-1)[order // 2]
        head = torch.arange(heads, device=device).unsqueeze(1)
        shared.accumulate(
            F.embedding_bag(
                (places + head * shared.height).view(-1),
                grad_rows,
                (offsets + head * bags.numel()).view(-1),
                mode="sum",
                per_sample_weights=weights.repeat(heads),
            )
        )


def _comfortable(length: int) -> int:
    """Rounded up to full vectors where that costs little."""
    full = -(-length // 16) * 16
    return full if full - length <= 4 else length


def _crop(table: Tensor, y0: int, y1: int, x0: int, x1: int) -> Tensor:
    """Rows [y0, y1), columns [x0, x1) of heads x Th x Tw, zeros where they lie outside."""
    height, width = table.shape[1:]
    return F.pad(table, (-x0, x1 - width, -y0, y1 - height))


def _uncrop(x: Tensor, y0: int, x0: int, into: Tensor) -> Tensor:
    """The inverse of ``_crop``: what lies outside is dropped."""
    height, width = into.shape[1:]
    return F.pad(x, (x0, width - x0 - x.shape[2], y0, height - y0 - x.shape[1]))
