"""The bias table as the attention kernels read it: planes, and where in them each key starts (``triton_kernels`` says why)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dattrain.ops.deformable_attention.coordinates import Geometry, QueryGrid, start_and_step

_LOG2E = tl.constexpr(1.4426950408889634)
BLOCK = 256
"""Keys, or cells of the planes, of a program."""
EDGE = 2.0**-16
"""How far below a whole index its cell begins already.

Rounding (by addition) sends a tie to the even neighbour, where ``grid_sample`` takes the floor, and with it the slope to the right.
With this much of a cell added first there is no tie, and planes are about a point this much off the centre. It is twice the rounding of
an index below 128.
"""


class Bias(NamedTuple):
    """The table as planes, the keys' starts in it, and what the kernels' arithmetic needs of both axes (y, x)."""

    starts: Tensor
    planes: Tensor
    step: tuple[float, float]
    slope: tuple[float, float]
    offset: tuple[float, float]
    """What turns a start into a table index."""
    constants: dict[str, Any]

    def of_images(self, images: slice) -> Bias:
        """Some of the batch."""
        return self._replace(starts=self.starts[images])

    @classmethod
    def of(cls, positions: Tensor, table: Tensor | None, q: Tensor, geometry: Geometry) -> Bias:
        """Two small kernels; nothing where there is no table."""
        half = q.element_size() == 2
        if table is None:
            constants = {"HAS_TABLE": False, "HALF": half, "PITCH": 1, "WORDS": 1}
            return cls(positions, positions, (0.0, 0.0), (0.0, 0.0), (0.0, 0.0), constants)
        positions, table = positions.contiguous(), table.contiguous()
        heads, *sizes = table.shape
        y, x = (_Axis.of(n, size, geometry.grid) for n, size in zip((geometry.height, geometry.width), sizes))
        broken = sizes[0] + 2 * y.pad
        rows, pitch = broken + y.pad, sizes[1] + 2 * x.pad
        starts = positions.new_empty(positions.shape[:3], dtype=torch.int64)
        planes = table.new_empty(heads, rows, pitch, 1 if half else 2, dtype=torch.int64)
        starts_kernel[(triton.cdiv(starts.numel(), BLOCK),)](
            positions, starts, starts.numel(), y.origin, x.origin, y.slope, x.slope, y.low, x.low, y.high, x.high,
            float(broken), BLOCK=BLOCK,
        )  # fmt: skip
        cells = heads * rows * pitch
        planes_kernel[(triton.cdiv(cells, BLOCK),)](
            table, planes, cells, rows * pitch, pitch, *sizes, y.pad, x.pad, broken, 0.5 - EDGE, HALF=half,
            BLOCK=BLOCK,
        )  # fmt: skip
        return cls(
            starts, planes, (y.step, x.step), (y.slope, x.slope), (y.offset, x.offset),
            {"HAS_TABLE": True, "HALF": half, "PITCH": pitch, "WORDS": planes[0].numel()},
        )  # fmt: skip


class _Axis(NamedTuple):
    """One axis of the planes: a key's start is ``origin + slope * position``, within ``low`` and ``high``."""

    origin: float
    slope: float
    step: float
    low: float
    high: float
    pad: int
    offset: float

    @classmethod
    def of(cls, size: int, table_size: int, grid: QueryGrid) -> _Axis:
        origin, slope, step = start_and_step(size, table_size, grid)
        # Zeros around, wide enough for the queries past the map that fill up a tile (none is higher or wider than 16).
        pad = math.ceil(step * triton.cdiv(size, 16) * 16) + 2
        shift = pad - 0.5 + EDGE
        low, high = -(step * (size - 1) + 1.25), table_size + 0.25
        return cls(origin + shift, slope, step, low + shift, high + shift, pad, -shift)


@triton.jit
def starts_kernel(
    positions, starts, n, origin_y, origin_x, slope_y, slope_x, low_y, low_x, high_y, high_x, broken,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Planes' index of every key for the first query, y and x as fp32 in 8 bytes, clamped to where all is zero.

    A key that is not finite starts at the row ``broken``, where the planes are no numbers.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(positions + 2 * i, mask=i < n, other=0.0)
    x = tl.load(positions + 2 * i + 1, mask=i < n, other=0.0)
    start_y = tl.minimum(tl.maximum(origin_y + slope_y * y, low_y), high_y)
    start_x = tl.minimum(tl.maximum(origin_x + slope_x * x, low_x), high_x)
    finite = (y - y == 0) & (x - x == 0)
    start_y = tl.where(finite, start_y, broken)
    start_x = tl.where(finite, start_x, low_x)
    low = start_y.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.store(starts + i, (start_x.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low, mask=i < n)


@triton.jit
def _entry(table, y, x, height, width, valid):
    inside = valid & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return tl.load(table + y * width + x, mask=inside, other=0.0)


@triton.jit
def planes_kernel(
    table, planes, n, cells, pitch, table_height, table_width, pad_y, pad_x, broken, at,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The planes of every cell of every head's table (module's docstring), about the point ``at`` of a cell along both axes."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = i < n
    y = i % cells // pitch - pad_y
    x = i % pitch - pad_x
    table += i // cells * (table_height * table_width)
    t00 = _entry(table, y, x, table_height, table_width, valid)
    t01 = _entry(table, y, x + 1, table_height, table_width, valid)
    t10 = _entry(table, y + 1, x, table_height, table_width, valid)
    t11 = _entry(table, y + 1, x + 1, table_height, table_width, valid)
    top = t00 + at * (t01 - t00)
    bottom = t10 + at * (t11 - t10)
    a = (top + at * (bottom - top)) * _LOG2E
    b = ((t01 - t00) + at * ((t11 - t10) - (t01 - t00))) * _LOG2E
    c = (bottom - top) * _LOG2E
    d = ((t11 - t10) - (t01 - t00)) * _LOG2E
    a = tl.where(y + pad_y < broken, a, float("nan"))
    if HALF:
        ab = (_bits16(b) << 16) | _bits16(a)
        cd = (_bits16(d) << 16) | _bits16(c)
        tl.store(planes + i, (cd << 32) | ab, mask=valid)
    else:
        tl.store(planes + 2 * i, (_bits32(b) << 32) | _bits32(a), mask=valid)
        tl.store(planes + 2 * i + 1, (_bits32(d) << 32) | _bits32(c), mask=valid)


@triton.jit
def _bits16(x):
    return x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF


@triton.jit
def _bits32(x):
    return x.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
