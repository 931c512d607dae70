"""The ``triton`` backend: one pass over the keys, with the bias sampled inside the score loop.

Forward keeps the output and the log-sum-exp; backward computes scores and bias again. Per (key, query) the table index
is ``start[key] + step * query_row`` along each axis, computed from two vectors in registers; the table (kilobytes, with
two rows and columns of zeros around it, so that no load needs a mask) stays in the L1 cache. Bias, softmax and all sums
are fp32. Gradients of positions are reduced over queries in registers and over heads afterwards; the table's go to one of
several copies by atomic adds, or, under ``torch.use_deterministic_algorithms``, through the scores' gradient written
out once and products with hat weights.

Tile sizes are chosen by reasoning, not measured. ``TRITON_INTERPRET=1`` runs these kernels on CPU tensors, for tests.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dattrain.ops.coordinates import QueryGrid, start_and_step
from dattrain.ops.precision import products_of

PAD = 2
"""Rows and columns of zeros around the table: an index clamped to [-2, size] reads zeros for both of its taps."""
TABLE_COPIES = 32
"""Copies of the table's gradient that atomic adds are spread over."""
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _taps(start, step, query, size, WHOLE: tl.constexpr):
    """Table index of a tile along one axis: first tap (clamped) and fraction."""
    if WHOLE:  # a query step is one cell: the fraction belongs to the key
        floor = tl.floor(start)
        fraction = start - floor
        first = floor.to(tl.int32) + query
        fraction = fraction + 0.0 * query.to(tl.float32)
    else:
        index = start + step * query.to(tl.float32)
        floor = tl.floor(index)
        fraction = index - floor
        first = floor.to(tl.int32)
    return tl.minimum(tl.maximum(first, -2), size), fraction


@triton.jit
def _bias(
    table, start_y, start_x, row, column, step_y, step_x, table_height, table_width, WHOLE: tl.constexpr
):
    """Bias of a tile, its slopes along y and x, and what an adjoint needs: address of the first tap and fractions."""
    y, fy = _taps(start_y, step_y, row, table_height, WHOLE)
    x, fx = _taps(start_x, step_x, column, table_width, WHOLE)
    pitch = table_width + 4
    offset = (y + 2) * pitch + x + 2
    v00 = tl.load(table + offset)
    v01 = tl.load(table + offset + 1)
    v10 = tl.load(table + offset + pitch)
    v11 = tl.load(table + offset + pitch + 1)
    top = v00 + fx * (v01 - v00)
    bottom = v10 + fx * (v11 - v10)
    along_y = bottom - top
    along_x = (v01 - v00) * (1 - fy) + (v11 - v10) * fy
    return top + fy * along_y, along_y, along_x, offset, fy, fx


@triton.jit
def _logits(
    q, k, positions, table, keys, rows, columns, in_keys, origin_y, origin_x, slope_y, slope_x, step_y, step_x,
    table_height, table_width, scale, HAS_TABLE: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits (queries x keys, fp32, -inf past the last key) and what ``_bias`` returns."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    along_y = logits
    along_x = logits
    offset = keys[None, :] + 0 * rows[:, None]
    fy = logits
    fx = logits
    if HAS_TABLE:
        y = tl.load(positions + keys * 2, mask=in_keys, other=0.0)
        x = tl.load(positions + keys * 2 + 1, mask=in_keys, other=0.0)
        bias, along_y, along_x, offset, fy, fx = _bias(
            table, (origin_y + slope_y * y)[None, :], (origin_x + slope_x * x)[None, :], rows[:, None],
            columns[:, None], step_y, step_x, table_height, table_width, WHOLE,
        )  # fmt: skip
        logits += bias
    logits = tl.where(in_keys[None, :], logits, float("-inf"))
    return logits, along_y, along_x, offset, fy, fx


@triton.jit
def _load(base, index, valid, stride, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Rows ``index`` of a matrix with unit column stride, zeros where not valid and past DIM."""
    column = tl.arange(0, PADDED)
    mask = valid[:, None] & (column < DIM)[None, :]
    return tl.load(base + index[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store(base, value, index, valid, stride, DIM: tl.constexpr, PADDED: tl.constexpr):
    column = tl.arange(0, PADDED)
    mask = valid[:, None] & (column < DIM)[None, :]
    tl.store(base + index[:, None] * stride + column[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _forward_kernel(
    q, k, v, positions, table, out, lse, heads, groups, queries, n_keys, width,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n,
    origin_y, origin_x, slope_y, slope_x, step_y, step_x, table_height, table_width, scale,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_TABLE: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head of one image, over all keys, with a running maximum (Milakov and Gimelshein 2018)."""
    image = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_queries = query < queries
    q_tile = _load(q + image * q_b + head * q_h, query, in_queries, q_n, DIM, PADDED)
    positions += (image * groups + head // (heads // groups)) * n_keys * 2
    table += head * (table_height + 4) * (table_width + 4)
    maximum = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    result = tl.zeros([BLOCK_Q, PADDED], tl.float32)
    for first in range(0, n_keys, BLOCK_K):
        key = first + tl.arange(0, BLOCK_K)
        in_keys = key < n_keys
        k_tile = _load(k + image * k_b + head * k_h, key, in_keys, k_n, DIM, PADDED)
        v_tile = _load(v + image * v_b + head * v_h, key, in_keys, v_n, DIM, PADDED)
        logits, _, _, _, _, _ = _logits(
            q_tile, k_tile, positions, table, key, query // width, query % width, in_keys, origin_y, origin_x,
            slope_y, slope_x, step_y, step_x, table_height, table_width, scale, HAS_TABLE, WHOLE, PRECISION,
        )  # fmt: skip
        highest = tl.maximum(maximum, tl.max(logits, 1))
        weights = tl.exp2((logits - highest[:, None]) * LOG2E)
        shrink = tl.exp2((maximum - highest) * LOG2E)
        total = total * shrink + tl.sum(weights, 1)
        result = result * shrink[:, None]
        result += tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=PRECISION)
        maximum = highest
    _store(out + image * o_b + head * o_h, result / total[:, None], query, in_queries, o_n, DIM, PADDED)
    lse += (image * heads + head) * queries
    tl.store(lse + query, maximum + tl.log(total), mask=in_queries)


@triton.jit
def _delta_kernel(
    grad_out, out, delta, heads, queries, g_b, g_h, g_n, o_b, o_h, o_n,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Row sums of grad_out * out: what the softmax's gradient subtracts (Dao et al. 2022, appendix B.2)."""
    image = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    valid = query < queries
    a = _load(grad_out + image * g_b + head * g_h, query, valid, g_n, DIM, PADDED).to(tl.float32)
    b = _load(out + image * o_b + head * o_h, query, valid, o_n, DIM, PADDED).to(tl.float32)
    tl.store(delta + (image * heads + head) * queries + query, tl.sum(a * b, 1), mask=valid)


@triton.jit
def _query_gradient_kernel(
    grad_out, q, k, v, positions, table, lse, delta, grad_q, heads, groups, queries, n_keys, width,
    g_b, g_h, g_n, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, d_b, d_h, d_n,
    origin_y, origin_x, slope_y, slope_x, step_y, step_x, table_height, table_width, scale,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_TABLE: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_q of one tile of queries, over all keys."""
    image = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_queries = query < queries
    q_tile = _load(q + image * q_b + head * q_h, query, in_queries, q_n, DIM, PADDED)
    g_tile = _load(grad_out + image * g_b + head * g_h, query, in_queries, g_n, DIM, PADDED)
    row = (image * heads + head) * queries
    normaliser = tl.load(lse + row + query, mask=in_queries, other=float("inf"))
    d = tl.load(delta + row + query, mask=in_queries, other=0.0)
    positions += (image * groups + head // (heads // groups)) * n_keys * 2
    table += head * (table_height + 4) * (table_width + 4)
    result = tl.zeros([BLOCK_Q, PADDED], tl.float32)
    for first in range(0, n_keys, BLOCK_K):
        key = first + tl.arange(0, BLOCK_K)
        in_keys = key < n_keys
        k_tile = _load(k + image * k_b + head * k_h, key, in_keys, k_n, DIM, PADDED)
        v_tile = _load(v + image * v_b + head * v_h, key, in_keys, v_n, DIM, PADDED)
        logits, _, _, _, _, _ = _logits(
            q_tile, k_tile, positions, table, key, query // width, query % width, in_keys, origin_y, origin_x,
            slope_y, slope_x, step_y, step_x, table_height, table_width, scale, HAS_TABLE, WHOLE, PRECISION,
        )  # fmt: skip
        weights = tl.exp2((logits - normaliser[:, None]) * LOG2E)
        grad_weights = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
        grad_logits = weights * (grad_weights - d[:, None])
        result += tl.dot(grad_logits.to(k_tile.dtype), k_tile, input_precision=PRECISION)
    _store(grad_q + image * d_b + head * d_h, result * scale, query, in_queries, d_n, DIM, PADDED)


@triton.jit
def _key_gradient_kernel(
    grad_out, q, k, v, positions, table, lse, delta, grad_k, grad_v, grad_positions, grad_table, grad_logits_out,
    heads, groups, queries, n_keys, width, copies,
    g_b, g_h, g_n, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    origin_y, origin_x, slope_y, slope_x, step_y, step_x, table_height, table_width, scale,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_TABLE: tl.constexpr, WHOLE: tl.constexpr, DETERMINISTIC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_k, grad_v and a head's share of grad_positions of one tile of keys, over all queries; and the table's part."""
    image = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    key = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_keys = key < n_keys
    k_tile = _load(k + image * k_b + head * k_h, key, in_keys, k_n, DIM, PADDED)
    v_tile = _load(v + image * v_b + head * v_h, key, in_keys, v_n, DIM, PADDED)
    positions += (image * groups + head // (heads // groups)) * n_keys * 2
    entries = (table_height + 4) * (table_width + 4)
    table += head * entries
    grad_table += ((image * tl.num_programs(0) + tl.program_id(0)) % copies * heads + head) * entries
    line = (image * heads + head) * queries
    sum_k = tl.zeros([BLOCK_K, PADDED], tl.float32)
    sum_v = tl.zeros([BLOCK_K, PADDED], tl.float32)
    sum_y = tl.zeros([BLOCK_K], tl.float32)
    sum_x = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, queries, BLOCK_Q):
        query = first + tl.arange(0, BLOCK_Q)
        in_queries = query < queries
        q_tile = _load(q + image * q_b + head * q_h, query, in_queries, q_n, DIM, PADDED)
        g_tile = _load(grad_out + image * g_b + head * g_h, query, in_queries, g_n, DIM, PADDED)
        normaliser = tl.load(lse + line + query, mask=in_queries, other=float("inf"))
        d = tl.load(delta + line + query, mask=in_queries, other=0.0)
        logits, along_y, along_x, offset, fy, fx = _logits(
            q_tile, k_tile, positions, table, key, query // width, query % width, in_keys, origin_y, origin_x,
            slope_y, slope_x, step_y, step_x, table_height, table_width, scale, HAS_TABLE, WHOLE, PRECISION,
        )  # fmt: skip
        weights = tl.exp2((logits - normaliser[:, None]) * LOG2E)
        sum_v += tl.dot(tl.trans(weights.to(g_tile.dtype)), g_tile, input_precision=PRECISION)
        grad_weights = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
        grad_logits = weights * (grad_weights - d[:, None])
        sum_k += tl.dot(tl.trans(grad_logits.to(q_tile.dtype)), q_tile, input_precision=PRECISION)
        if HAS_TABLE:
            sum_y += tl.sum(grad_logits * along_y, 0)
            sum_x += tl.sum(grad_logits * along_x, 0)
            valid = in_queries[:, None] & in_keys[None, :]
            if DETERMINISTIC:
                place = (line.to(tl.int64) * n_keys) + key[None, :] * queries + query[:, None]
                tl.store(grad_logits_out + place, grad_logits, mask=valid)
            else:
                pitch = table_width + 4
                left = grad_logits * (1 - fx)
                right = grad_logits * fx
                tl.atomic_add(grad_table + offset, left * (1 - fy), mask=valid, sem="relaxed")
                tl.atomic_add(grad_table + offset + 1, right * (1 - fy), mask=valid, sem="relaxed")
                tl.atomic_add(grad_table + offset + pitch, left * fy, mask=valid, sem="relaxed")
                tl.atomic_add(grad_table + offset + pitch + 1, right * fy, mask=valid, sem="relaxed")
    _store(grad_k + image * dk_b + head * dk_h, sum_k * scale, key, in_keys, dk_n, DIM, PADDED)
    _store(grad_v + image * dv_b + head * dv_h, sum_v, key, in_keys, dv_n, DIM, PADDED)
    if HAS_TABLE:
        grad_positions += (image * heads + head) * n_keys * 2
        tl.store(grad_positions + key * 2, sum_y * slope_y, mask=in_keys)
        tl.store(grad_positions + key * 2 + 1, sum_x * slope_x, mask=in_keys)


@triton.jit
def _table_gradient_kernel(
    grad_logits, positions, partial, batch, heads, groups, n_keys, height, width, per_program,
    origin_y, origin_x, slope_y, slope_x, step_y, step_x, table_height, table_width,
    TILE: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of one head's table gradient over some (image, key) pairs: hats_y^T @ grad_logits @ hats_x, in a fixed order."""
    tiles_x = tl.cdiv(table_width, TILE)
    table_y = tl.program_id(0) // tiles_x * TILE + tl.arange(0, TILE)
    table_x = tl.program_id(0) % tiles_x * TILE + tl.arange(0, TILE)
    head = tl.program_id(1)
    result = tl.zeros([TILE, TILE], tl.float32)
    for pair in range(
        tl.program_id(2) * per_program, tl.minimum((tl.program_id(2) + 1) * per_program, batch * n_keys)
    ):
        image = (pair // n_keys).to(tl.int64)
        key = pair % n_keys
        place = positions + ((image * groups + head // (heads // groups)) * n_keys + key) * 2
        start_y = origin_y + slope_y * tl.load(place)
        start_x = origin_x + slope_x * tl.load(place + 1)
        source = grad_logits + ((image * heads + head) * n_keys + key) * height * width
        for first_y in range(0, height, BLOCK_Y):
            row = first_y + tl.arange(0, BLOCK_Y)
            half = tl.zeros([BLOCK_Y, TILE], tl.float32)
            for first_x in range(0, width, BLOCK_X):
                column = first_x + tl.arange(0, BLOCK_X)
                valid = (row < height)[:, None] & (column < width)[None, :]
                tile = tl.load(source + row[:, None] * width + column[None, :], mask=valid, other=0.0)
                distance = (start_x + step_x * column.to(tl.float32))[:, None] - table_x.to(tl.float32)[
                    None, :
                ]
                half += tl.dot(tile, tl.maximum(1 - tl.abs(distance), 0.0), input_precision=PRECISION)
            distance = table_y.to(tl.float32)[:, None] - (start_y + step_y * row.to(tl.float32))[None, :]
            result += tl.dot(tl.maximum(1 - tl.abs(distance), 0.0), half, input_precision=PRECISION)
    place = (tl.program_id(2) * heads + head) * table_height * table_width
    inside = (table_y < table_height)[:, None] & (table_x < table_width)[None, :]
    tl.store(partial + place + table_y[:, None] * table_width + table_x[None, :], result, mask=inside)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor | None,
    height: int,
    width: int,
    grid: QueryGrid,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (as q, laid out B x queries x heads x d in memory) and log-sum-exp (B x heads x queries, fp32)."""
    q, k, v, positions = (_unit_stride(q), _unit_stride(k), _unit_stride(v), positions.contiguous())
    batch, heads, queries, dim = q.shape
    out = q.new_empty(batch, queries, heads, dim).transpose(1, 2)
    lse = positions.new_empty(batch, heads, queries)
    if batch:
        tiles = _tiles(q)
        _forward_kernel[(triton.cdiv(queries, tiles["BLOCK_Q"]), batch * heads)](
            q, k, v, positions, _padded(table, positions), out, lse, heads, positions.shape[1], queries, k.shape[2],
            width, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            *_axes(table, height, width, grid), scale, **_constants(q, table, height, width, grid), **tiles,
        )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor | None,
    out: Tensor,
    lse: Tensor,
    height: int,
    width: int,
    grid: QueryGrid,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v (laid out B x length x heads x d in memory), positions and table."""
    grad_out, q, k, v, out = (_unit_stride(x) for x in (grad_out, q, k, v, out))
    positions, lse = positions.contiguous(), lse.contiguous()
    batch, heads, queries, dim = q.shape
    groups, keys = positions.shape[1:3]
    grad_q = q.new_empty(batch, queries, heads, dim).transpose(1, 2)
    grad_k, grad_v = (x.new_empty(batch, keys, heads, dim).transpose(1, 2) for x in (k, v))
    grad_positions = positions.new_zeros(positions.shape)
    grad_table = None if table is None else torch.zeros_like(table)
    if not batch:
        return grad_q, grad_k, grad_v, grad_positions, grad_table
    deterministic = torch.are_deterministic_algorithms_enabled()
    padded = _padded(table, positions)
    per_head = positions.new_empty(batch, heads, keys, 2)
    copies = (
        positions.new_zeros(TABLE_COPIES, *padded.shape) if table is not None and not deterministic else lse
    )
    written = positions.new_empty(batch, heads, keys, queries) if table is not None and deterministic else lse
    axes, constants, tiles = (
        _axes(table, height, width, grid), _constants(q, table, height, width, grid), _tiles(q)
    )  # fmt: skip
    delta = torch.empty_like(lse)
    query_tiles = (triton.cdiv(queries, tiles["BLOCK_Q"]), batch * heads)
    _delta_kernel[query_tiles](
        grad_out, out, delta, heads, queries, *grad_out.stride()[:3], *out.stride()[:3], DIM=dim,
        PADDED=constants["PADDED"], BLOCK_Q=tiles["BLOCK_Q"],
    )  # fmt: skip
    _key_gradient_kernel[(triton.cdiv(keys, tiles["BLOCK_K"]), batch * heads)](
        grad_out, q, k, v, positions, padded, lse, delta, grad_k, grad_v, per_head, copies, written, heads, groups,
        queries, keys, width, TABLE_COPIES, *grad_out.stride()[:3], *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], *grad_k.stride()[:3], *grad_v.stride()[:3], *axes, scale, DETERMINISTIC=deterministic,
        **constants, **tiles,
    )  # fmt: skip
    _query_gradient_kernel[query_tiles](
        grad_out, q, k, v, positions, padded, lse, delta, grad_q, heads, groups, queries, keys, width,
        *grad_out.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_q.stride()[:3], *axes,
        scale, **constants, **tiles,
    )  # fmt: skip
    if table is not None:
        grad_positions = per_head.view(batch, groups, heads // groups, keys, 2).sum(2)
        if deterministic:
            grad_table = _deterministic_table_gradient(written, positions, table, height, width, axes)
        else:
            grad_table = copies.sum(0)[:, PAD:-PAD, PAD:-PAD].contiguous()
    return grad_q, grad_k, grad_v, grad_positions, grad_table


def _deterministic_table_gradient(
    grad_logits: Tensor, positions: Tensor, table: Tensor, height: int, width: int, axes: tuple[Any, ...]
) -> Tensor:
    batch, heads, keys, _ = grad_logits.shape
    _, table_height, table_width = table.shape
    tile, block = 32, 32
    splits = min(64, batch * keys)
    per_program = triton.cdiv(batch * keys, splits)
    partial = table.new_empty(splits, heads, table_height, table_width)
    tiles = triton.cdiv(table_height, tile) * triton.cdiv(table_width, tile)
    _table_gradient_kernel[(tiles, heads, splits)](
        grad_logits, positions, partial, batch, heads, positions.shape[1], keys, height, width, per_program, *axes,
        TILE=tile, BLOCK_Y=block, BLOCK_X=block, PRECISION="tf32x3",
    )  # fmt: skip
    return partial.sum(0)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _padded(table: Tensor | None, positions: Tensor) -> Tensor:
    return positions if table is None else F.pad(table, (PAD,) * 4).contiguous()


def _axes(table: Tensor | None, height: int, width: int, grid: QueryGrid) -> tuple[Any, ...]:
    """origin, slope, step of both axes (y, x in turn) and the table's size."""
    table_height, table_width = (1, 1) if table is None else table.shape[1:]
    y, x = start_and_step(height, table_height, grid), start_and_step(width, table_width, grid)
    return (*(value for pair in zip(y, x) for value in pair), table_height, table_width)


def _constants(q: Tensor, table: Tensor | None, height: int, width: int, grid: QueryGrid) -> dict[str, Any]:
    dim = q.shape[-1]
    whole = table is not None and all(
        size == 1 or start_and_step(size, table_size, grid)[2] == 1.0
        for size, table_size in zip((height, width), table.shape[1:])
    )
    return {
        "DIM": dim,
        "PADDED": max(16, triton.next_power_of_2(dim)),
        "HAS_TABLE": table is not None,
        "WHOLE": whole,
        "PRECISION": products_of(q),
    }


def _tiles(q: Tensor) -> dict[str, int]:
    """Sized so that two stages of tiles fit into 99 KiB of shared memory, the least of the supported devices."""
    wide = q.element_size() > 2 or q.shape[-1] > 64
    return {"BLOCK_Q": 32 if wide else 64, "BLOCK_K": 32 if wide else 64, "num_warps": 4, "num_stages": 2}
