"""What the attention kernels read: the bias table as planes, where in them each key starts, and the rows' sums (``triton_kernels`` says why)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dattrain.ops.deformable_attention.coordinates import Geometry, QueryGrid, start_and_step
from dattrain.ops.deformable_attention.triton_tiles import Piece

_LOG2E = tl.constexpr(1.4426950408889634)
BLOCK = 256
"""Keys, or cells of the planes, of a program."""
BLOCK_Q = 64
"""Queries of a program; twice that where it leaves no more of the last one empty."""
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
    pitch: int
    """Cells of a row of the planes."""
    words: int
    """8-byte numbers of a head's planes."""
    constants: dict[str, Any]

    def of(self, piece: Piece) -> Bias:
        """Some images, heads or keys."""
        starts = self.starts[piece.positions]
        return self._replace(
            starts=starts, planes=self.planes[piece.heads] if self.constants["HAS_TABLE"] else self.planes
        )


class Rows(NamedTuple):
    """What the softmax's gradient subtracts from each row, to be made: ``delta`` (B x heads x queries, fp32)."""

    grad_out: Tensor
    out: Tensor
    delta: Tensor


def prepare(
    positions: Tensor, table: Tensor | None, q: Tensor, geometry: Geometry, rows: Rows | None = None
) -> Bias:
    """Starts and planes, where there is a table, and for backward ``rows.delta``: all by one launch."""
    half = q.element_size() == 2
    if table is None:
        bias = Bias(
            positions, positions, (0.0, 0.0), (0.0, 0.0), (0.0, 0.0), 1, 1, {"HAS_TABLE": False, "HALF": half}
        )
        programs, scalars = (0, 0), (0, 0, 0, 0, *[0.0] * 8, 0)
    else:
        positions, table = positions.contiguous(), table.contiguous()
        heads, *sizes = table.shape
        y, x = (_Axis.of(n, size, geometry.grid) for n, size in zip((geometry.height, geometry.width), sizes))
        broken = sizes[0] + 2 * y.pad
        pitch = sizes[1] + 2 * x.pad
        starts = positions.new_empty(positions.shape[:3], dtype=torch.int64)
        planes = table.new_empty(heads, broken + y.pad, pitch, 1 if half else 2, dtype=torch.int64)
        bias = Bias(
            starts, planes, (y.step, x.step), (y.slope, x.slope), (y.offset, x.offset), pitch, planes[0].numel(),
            {"HAS_TABLE": True, "HALF": half},
        )  # fmt: skip
        cells = heads * (broken + y.pad) * pitch
        programs = triton.cdiv(starts.numel(), BLOCK), triton.cdiv(cells, BLOCK)
        scalars = (
            *sizes, y.pad, x.pad, y.origin, x.origin, y.slope, x.slope, y.low, x.low, y.high, x.high, broken
        )  # fmt: skip
    grad_out, out, delta = rows or (q, q, positions)
    batch, heads, queries, dim = grad_out.shape
    block_q = 2 * BLOCK_Q if triton.cdiv(queries, BLOCK_Q) % 2 == 0 else BLOCK_Q
    blocks = triton.cdiv(queries, block_q) if rows else 0
    launched = sum(programs) + batch * heads * blocks
    if launched:
        prepare_kernel[(launched,)](
            positions, bias.starts, positions if table is None else table, bias.planes, grad_out, out, delta,
            *programs, bias.starts.numel(), *bias.planes.shape[:2], bias.pitch, *scalars, 0.5 - EDGE,
            heads, queries, blocks, *grad_out.stride()[:3], *out.stride()[:3],
            HALF=half, BLOCK=BLOCK, DELTA=rows is not None, D=dim, BLOCK_Q=block_q,
        )  # fmt: skip
    return bias


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


@triton.jit(
    do_not_specialize=[
        "starts_programs", "planes_programs", "n_starts", "n_heads", "n_rows", "pitch", "table_height", "table_width",
        "pad_y", "pad_x", "broken", "heads", "queries", "blocks",
    ]
)  # fmt: skip
def prepare_kernel(
    positions, starts, table, planes, grad_out, out, delta,
    starts_programs, planes_programs, n_starts, n_heads, n_rows, pitch, table_height, table_width, pad_y, pad_x,
    origin_y, origin_x, slope_y, slope_x, low_y, low_x, high_y, high_x, broken, at,
    heads, queries, blocks, g_b, g_h, g_n, o_b, o_h, o_n,
    HALF: tl.constexpr, BLOCK: tl.constexpr, DELTA: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Programs for the starts, then for the planes, then for delta."""
    program = tl.program_id(0)
    if program < starts_programs:
        _starts(
            program, positions, starts, n_starts, origin_y, origin_x, slope_y, slope_x, low_y, low_x, high_y, high_x,
            broken.to(tl.float32), BLOCK,
        )  # fmt: skip
    elif program < starts_programs + planes_programs:
        _planes(
            program - starts_programs, table, planes, n_heads * n_rows * pitch, n_rows * pitch, pitch, table_height,
            table_width, pad_y, pad_x, broken, at, HALF, BLOCK,
        )  # fmt: skip
    elif DELTA:
        program -= starts_programs + planes_programs
        _delta(
            program // blocks, program % blocks, grad_out, out, delta, heads, queries, g_b, g_h, g_n, o_b, o_h, o_n,
            D, BLOCK_Q,
        )  # fmt: skip


@triton.jit
def _starts(
    program, positions, starts, n, origin_y, origin_x, slope_y, slope_x, low_y, low_x, high_y, high_x, broken,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Planes' index of every key for the first query, y and x as fp32 in 8 bytes, clamped to where all is zero.

    A key that is not finite starts at the row ``broken``, where the planes are no numbers.
    """
    i = program * BLOCK + tl.arange(0, BLOCK)
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
def _planes(
    program, table, planes, n, cells, pitch, table_height, table_width, pad_y, pad_x, broken, at,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The planes of every cell of every head's table (module's docstring), about the point ``at`` of a cell along both axes."""
    i = program * BLOCK + tl.arange(0, BLOCK)
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


@triton.jit
def _delta(
    line, block, grad_out, out, delta, heads, queries, g_b, g_h, g_n, o_b, o_h, o_n, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Row sums of grad_out * out: what the softmax's gradient subtracts (Dao et al. 2022, appendix B.2)."""
    image = (line // heads).to(tl.int64)
    head = line % heads
    query = block * BLOCK + tl.arange(0, BLOCK)
    valid = query < queries
    d = tl.arange(0, D)
    grad_out += image * g_b + head * g_h
    out += image * o_b + head * o_h
    g = tl.load(grad_out + query[:, None] * g_n + d[None, :], mask=valid[:, None], other=0.0)
    o = tl.load(out + query[:, None] * o_n + d[None, :], mask=valid[:, None], other=0.0)
    total = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + (image * heads + head) * queries + query, total, mask=valid)
