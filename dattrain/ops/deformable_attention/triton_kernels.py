"""The ``triton`` backend's kernels: attention whose bias is sampled inside the score loop (``backend_triton`` launches them).

What makes a score cheap, in the order of effect (counted in machine instructions: docs/benchmarks/kernels-ahead-of-time.md):

- **Planes.** Within a cell of the table the bias is ``a + gx b + gy (c + gx d)`` about the cell's centre. The four numbers, times
  log2 e, lie together, so that a score takes one 8-byte load (fp16 planes, for half-precision inputs; two loads of fp32 planes
  otherwise) and three fused multiply-adds, and both slopes come with it.
- **No clamps, no conversions.** Zeros lie around the planes, and a key's start is clamped once, outside of the loop. Adding
  1.5 * 2**23 rounds to an integer that then sits in the low bits, so neither floor nor a conversion is needed.
- **Patches.** A tile of queries is ``S`` sub-tiles of R rows and C columns that share their columns' index. The order of queries in a
  tile is free: query ``n`` is at sub-tile ``n % S``, row ``n // S // C`` and column ``n // S % C`` of it.
- **Full tiles without masks**, and one small tile for the keys left over.
- **One pass for backward.** It writes the scores' gradient once, in the tile's own order. The gradients of queries and of the table are
  products with that: no atomics, so that the same inputs always give the same bits.

Planes are loaded as one dimension, so that a warp's 32 loads are neighbouring queries of one or two keys, and hit the same few cache
lines. Two-dimensional, they would get the layout that the compiler finds for other loads of that shape, up to 32 keys in a warp.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: neighbouring fp32 numbers are one apart there
MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def _cell(start, query):
    """Cell of a table index, MAGIC_BITS too high, and where in it, from its centre, in [-.5, .5]. ``start`` is half a cell early."""
    index = start + query
    shifted = index + MAGIC
    return shifted.to(tl.int32, bitcast=True), index - (shifted - MAGIC)


@triton.jit
def _fp16(packed, SHIFT: tl.constexpr):
    return (packed >> SHIFT).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _fp32(packed, SHIFT: tl.constexpr):
    return (packed >> SHIFT).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _plane(planes, cell, HALF: tl.constexpr):
    """a, b, c, d of each cell of a tile, keys x queries."""
    flat = tl.reshape(cell, (cell.shape[0] * cell.shape[1],))
    if HALF:
        abcd = tl.reshape(tl.load(planes + flat), cell.shape)
        return _fp16(abcd, 0), _fp16(abcd, 16), _fp16(abcd, 32), _fp16(abcd, 48)
    else:
        ab = tl.reshape(tl.load(planes + 2 * flat), cell.shape)
        cd = tl.reshape(tl.load(planes + 2 * flat + 1), cell.shape)
        return _fp32(ab, 0), _fp32(ab, 32), _fp32(cd, 0), _fp32(cd, 32)


@triton.jit
def _start(starts, key, in_keys, MASKED: tl.constexpr):
    if MASKED:
        packed = tl.load(starts + key, mask=in_keys, other=0)
    else:
        packed = tl.load(starts + key)
    return _fp32(packed, 0), _fp32(packed, 32)


@triton.jit
def _interleave(parts):
    """S tiles [A, B] to one [A, B * S] whose element ``b * S + s`` is of tile s."""
    if len(parts) == 1:
        return parts[0]
    elif len(parts) == 2:
        return tl.reshape(tl.join(parts[0], parts[1]), (parts[0].shape[0], parts[0].shape[1] * 2))
    else:
        even = tl.reshape(tl.join(parts[0], parts[2]), (parts[0].shape[0], parts[0].shape[1] * 2))
        odd = tl.reshape(tl.join(parts[1], parts[3]), (parts[0].shape[0], parts[0].shape[1] * 2))
        return tl.reshape(tl.join(even, odd), (parts[0].shape[0], parts[0].shape[1] * 4))


@triton.jit
def _separate(x, S: tl.constexpr):
    """The inverse of ``_interleave`` for S = 1 or 2."""
    if S == 1:
        return (x,)
    else:
        first, second = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        return (first, second)


@triton.jit
def _bias(planes, y, x, row, column, step_y, pitch, R: tl.constexpr, S: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """Bias of a tile, keys x (S * R * C) queries, and the slopes along y and x of each sub-tile; times log2 e."""
    cell_x, gx = _cell(x[:, None], column[None, :])
    # What both cells are too high by, taken off once for S sub-tiles; products of 32 bits wrap around.
    cell_x -= MAGIC_BITS * pitch + MAGIC_BITS
    values = ()
    slopes_y = ()
    slopes_x = ()
    for s in tl.static_range(S):
        cell_y, gy = _cell(y[:, None], (row + (s * R) * step_y)[None, :])
        a, b, c, d = _plane(planes, cell_y * pitch + cell_x, HALF)
        along_y = c + gx * d
        values = values + ((a + gx * b) + gy * along_y,)
        slopes_y = slopes_y + (along_y,)
        slopes_x = slopes_x + (b + gy * d,)
    return _interleave(values), slopes_y, slopes_x


@triton.jit
def _queries(n, first_row, first_column, R: tl.constexpr, C: tl.constexpr, S: tl.constexpr):
    """Map row and column of a patch's n-th query."""
    return first_row + (n % S) * R + (n // S) // C, first_column + (n // S) % C


@triton.jit
def _forward_step(
    q_tile, k, v, starts, planes, first, n_keys, k_n, v_n, row, column, step_y, scale, result, maximum, total, pitch,
    D: tl.constexpr, R: tl.constexpr, S: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
    HAS_TABLE: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys, with a running maximum (Milakov and Gimelshein 2018), in units of log 2."""
    d = tl.arange(0, D)
    key = first + tl.arange(0, BLOCK_K)
    in_keys = key < n_keys
    if MASKED:
        k_tile = tl.load(k + key[None, :] * k_n + d[:, None], mask=in_keys[None, :], other=0.0)
        v_tile = tl.trans(tl.load(v + key[None, :] * v_n + d[:, None], mask=in_keys[None, :], other=0.0))
    else:
        k_tile = tl.load(k + key[None, :] * k_n + d[:, None])
        v_tile = tl.trans(tl.load(v + key[None, :] * v_n + d[:, None]))
    if HAS_TABLE:
        y, x = _start(starts, key, in_keys, MASKED)
        bias, _, _ = _bias(planes, y, x, row, column, step_y, pitch, R, S, HALF)
        if MASKED:
            bias = tl.where(in_keys[:, None], bias, float("-inf"))
        logits = tl.dot(q_tile, k_tile, input_precision=PRECISION) * scale + tl.trans(bias)
    else:
        logits = tl.dot(q_tile, k_tile, input_precision=PRECISION) * scale
        if MASKED:
            logits = tl.where(in_keys[None, :], logits, float("-inf"))
    highest = tl.maximum(maximum, tl.max(logits, 1))
    weights = tl.exp2(logits - highest[:, None])
    shrink = tl.exp2(maximum - highest)
    total = total * shrink + tl.sum(weights, 1)
    result = result * shrink[:, None] + tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=PRECISION)
    return result, highest, total


@triton.jit(do_not_specialize=["height", "width", "pitch", "words"])
def forward_kernel(
    q, k, v, starts, planes, out, lse, heads, groups, n_keys, height, width, pitch, words,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, step_y, step_x, scale,
    H: tl.constexpr, W: tl.constexpr, D: tl.constexpr, R: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
    BLOCK_K: tl.constexpr, TAIL: tl.constexpr, HAS_TABLE: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A patch of queries of one head of one image over all keys; grid (batch * heads, patches down, patches across)."""
    height = H if H > 0 else height
    width = W if W > 0 else width
    image = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    first_row = tl.program_id(1) * (S * R)
    first_column = tl.program_id(2) * C
    query_row, query_column = _queries(tl.arange(0, S * R * C), first_row, first_column, R, C, S)
    in_map = (query_row < height) & (query_column < width)
    query = query_row * width + query_column
    d = tl.arange(0, D)
    q_tile = tl.trans(
        tl.load(
            q + image * q_b + head * q_h + query[None, :] * q_n + d[:, None], mask=in_map[None, :], other=0.0
        )
    )
    starts += (image * groups + head // (heads // groups)) * n_keys
    planes += head * words
    m = tl.arange(0, R * C)
    row = (first_row + m // C).to(tl.float32) * step_y
    column = (first_column + m % C).to(tl.float32) * step_x
    maximum = tl.full([S * R * C], float("-inf"), tl.float32)
    total = tl.zeros([S * R * C], tl.float32)
    result = tl.zeros([S * R * C, D], tl.float32)
    k += image * k_b + head * k_h
    v += image * v_b + head * v_h
    scale *= LOG2E
    whole = n_keys // BLOCK_K * BLOCK_K
    for first in range(0, whole, BLOCK_K):
        result, maximum, total = _forward_step(
            q_tile, k, v, starts, planes, first, n_keys, k_n, v_n, row, column, step_y, scale, result, maximum, total,
            pitch, D, R, S, BLOCK_K, False, HAS_TABLE, HALF, PRECISION,
        )  # fmt: skip
    if TAIL > 0:
        result, maximum, total = _forward_step(
            q_tile, k, v, starts, planes, whole, n_keys, k_n, v_n, row, column, step_y, scale, result, maximum, total,
            pitch, D, R, S, TAIL, True, HAS_TABLE, HALF, PRECISION,
        )  # fmt: skip
    result = tl.trans((result / total[:, None]).to(out.dtype.element_ty))
    out += image * o_b + head * o_h
    tl.store(out + query[None, :] * o_n + d[:, None], result, mask=in_map[None, :])
    lse += (image * heads + head) * (height * width)
    tl.store(lse + query, (maximum + tl.log2(total)) * LN2, mask=in_map)


@triton.jit(do_not_specialize=["height", "width", "pitch", "words"])
def backward_kernel(
    grad_out, q, k, v, starts, planes, lse, delta, grad_k, grad_v, grad_starts, grad_logits,
    heads, groups, n_keys, first_key, places, height, width, pitch, words,
    g_b, g_h, g_n, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    step_y, step_x, slope_y, slope_x, scale,
    H: tl.constexpr, W: tl.constexpr, D: tl.constexpr, R: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
    BLOCK_K: tl.constexpr, MASKED: tl.constexpr, HAS_TABLE: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of keys over all queries: grad_k, grad_v, a head's share of the positions' gradient, and the scores' gradient."""
    image = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    height = H if H > 0 else height
    width = W if W > 0 else width
    BLOCK_Q: tl.constexpr = S * R * C
    ACROSS: tl.constexpr = (W + C - 1) // C
    places = (H + S * R - 1) // (S * R) * ACROSS * BLOCK_Q if H > 0 else places
    d = tl.arange(0, D)
    n = tl.arange(0, BLOCK_Q)
    m = tl.arange(0, R * C)
    key = first_key + tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_keys = (key < n_keys) | (not MASKED)
    k += image * k_b + head * k_h
    v += image * v_b + head * v_h
    k_tile = tl.trans(tl.load(k + key[None, :] * k_n + d[:, None], mask=in_keys[None, :], other=0.0))
    v_tile = tl.trans(tl.load(v + key[None, :] * v_n + d[:, None], mask=in_keys[None, :], other=0.0))
    starts += (image * groups + head // (heads // groups)) * n_keys
    planes += head * words
    line = (image * heads + head) * (height * width)
    q += image * q_b + head * q_h
    grad_out += image * g_b + head * g_h
    grad_logits += (image * heads + head) * n_keys * places
    sum_k = tl.zeros([BLOCK_K, D], tl.float32)
    sum_v = tl.zeros([BLOCK_K, D], tl.float32)
    sum_y = tl.zeros([BLOCK_K, R * C], tl.float32)
    sum_x = tl.zeros([BLOCK_K, R * C], tl.float32)
    first_row = 0
    first_column = 0
    for patch in range(0, places // BLOCK_Q):
        if H > 0:
            first_row = patch // ACROSS * (S * R)
            first_column = patch % ACROSS * C
        query_row, query_column = _queries(n, first_row, first_column, R, C, S)
        in_map = (query_row < height) & (query_column < width)
        query = query_row * width + query_column
        q_tile = tl.load(q + query[None, :] * q_n + d[:, None], mask=in_map[None, :], other=0.0)
        g_tile = tl.load(grad_out + query[None, :] * g_n + d[:, None], mask=in_map[None, :], other=0.0)
        normaliser = tl.load(lse + line + query, mask=in_map, other=float("inf")) * LOG2E
        subtracted = tl.load(delta + line + query, mask=in_map, other=0.0)
        if HAS_TABLE:
            row = (first_row + m // C).to(tl.float32) * step_y
            column = (first_column + m % C).to(tl.float32) * step_x
            y, x = _start(starts, key, in_keys, MASKED)
            bias, slopes_y, slopes_x = _bias(planes, y, x, row, column, step_y, pitch, R, S, HALF)
            logits = tl.dot(k_tile, q_tile, input_precision=PRECISION) * (scale * LOG2E) + bias
        else:
            logits = tl.dot(k_tile, q_tile, input_precision=PRECISION) * (scale * LOG2E)
        # Queries past the map get no weight, their normaliser being infinite; keys past the last are dropped at the stores.
        weights = tl.exp2(logits - normaliser[None, :])
        sum_v += tl.dot(weights.to(g_tile.dtype), tl.trans(g_tile), input_precision=PRECISION)
        grad_weights = tl.dot(v_tile, g_tile, input_precision=PRECISION)
        grad = weights * (grad_weights - subtracted[None, :])
        rounded = grad.to(q_tile.dtype)
        place = key[None, :] * places + (patch * BLOCK_Q + n)[:, None]
        tl.store(grad_logits + place, tl.trans(rounded), mask=in_keys[None, :])
        sum_k += tl.dot(rounded, tl.trans(q_tile), input_precision=PRECISION)
        if HAS_TABLE:
            parts = _separate(grad, S)
            for s in tl.static_range(S):
                sum_y += parts[s] * slopes_y[s]
                sum_x += parts[s] * slopes_x[s]
        if H == 0:
            first_column += C
            if first_column >= width:
                first_column = 0
                first_row += S * R
    grad_k += image * dk_b + head * dk_h
    grad_v += image * dv_b + head * dv_h
    sum_k = tl.trans((sum_k * scale).to(grad_k.dtype.element_ty))
    sum_v = tl.trans(sum_v.to(grad_v.dtype.element_ty))
    tl.store(grad_k + key[None, :] * dk_n + d[:, None], sum_k, mask=in_keys[None, :])
    tl.store(grad_v + key[None, :] * dv_n + d[:, None], sum_v, mask=in_keys[None, :])
    if HAS_TABLE:
        grad_starts += ((image * heads + head) * n_keys + key) * 2
        tl.store(grad_starts, tl.sum(sum_y, 1) * (slope_y * LN2), mask=in_keys)
        tl.store(grad_starts + 1, tl.sum(sum_x, 1) * (slope_x * LN2), mask=in_keys)
