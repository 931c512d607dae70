"""The ``triton`` backend's kernels of what follows from the scores' gradient: the gradients of queries and table, and the last sums.

They are products with what ``triton_kernels.backward_kernel`` wrote, in an order that does not depend on which program runs first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dattrain.ops.deformable_attention.triton_kernels import _fp32, _queries


@triton.jit(do_not_specialize=["height", "width"])
def query_gradient_kernel(
    grad_logits, k, grad_q, heads, n_keys, places, height, width, k_b, k_h, k_n, d_b, d_h, d_n, scale,
    H: tl.constexpr, W: tl.constexpr, D: tl.constexpr, R: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TAIL: tl.constexpr, MORE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_q of some places of one head, or what some keys add to it, from the scores' gradient (keys x places): grad_logits^T @ k."""
    height = H if H > 0 else height
    width = W if W > 0 else width
    places = tl.cdiv(H, S * R) * tl.cdiv(W, C) * (S * R * C) if H > 0 else places
    image = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    n = tl.arange(0, BLOCK_Q)
    place = tl.program_id(1) * BLOCK_Q + n
    d = tl.arange(0, D)
    grad_logits += (image * heads + head) * n_keys * places
    k += image * k_b + head * k_h
    result = tl.zeros([BLOCK_Q, D], tl.float32)
    key = tl.arange(0, BLOCK_K)
    whole = n_keys // BLOCK_K * BLOCK_K
    for _ in range(0, whole, BLOCK_K):
        grad = tl.load(grad_logits + key[:, None] * places + place[None, :])
        k_tile = tl.load(k + key[:, None] * k_n + d[None, :])
        result = tl.dot(tl.trans(grad), k_tile, result, input_precision=PRECISION)
        grad_logits += BLOCK_K * places
        k += BLOCK_K * k_n
    if TAIL > 0:
        key = tl.arange(0, TAIL)
        in_keys = (key < n_keys - whole)[:, None]
        grad = tl.load(grad_logits + key[:, None] * places + place[None, :], mask=in_keys, other=0.0)
        k_tile = tl.load(k + key[:, None] * k_n + d[None, :], mask=in_keys, other=0.0)
        result = tl.dot(tl.trans(grad), k_tile, result, input_precision=PRECISION)
    # One division for all: the tile's other patches are to the right of the first, or begin the next row of patches.
    PATCH: tl.constexpr = S * R * C
    across = tl.cdiv(width, C)
    patch = tl.program_id(1) * (BLOCK_Q // PATCH)
    down = patch // across
    right = patch - down * across + n // PATCH
    for _ in tl.static_range(BLOCK_Q // PATCH - 1):
        past = right >= across
        down = tl.where(past, down + 1, down)
        right = tl.where(past, right - across, right)
    row, column = _queries(n % PATCH, down * (S * R), right * C, R, C, S)
    grad_q += image * d_b + head * d_h + (row * width + column)[:, None] * d_n + d[None, :]
    in_map = ((row < height) & (column < width))[:, None]
    result *= scale
    if MORE:
        result += tl.load(grad_q, mask=in_map, other=0.0)
    tl.store(grad_q, result.to(grad_q.dtype.element_ty), mask=in_map)


@triton.jit
def _hat(distance):
    """Weight of a table entry for an index that far away."""
    return tl.maximum(1.0 - tl.abs(distance), 0.0)


@triton.jit(
    do_not_specialize=[
        "batch",
        "height",
        "width",
        "per_program",
        "down",
        "across",
        "table_height",
        "table_width",
    ]
)
def table_gradient_kernel(
    grad_logits, starts, partial, batch, heads, groups, n_keys, places, height, width, per_program, down, across, part,
    step_y, step_x, offset_y, offset_x, table_height, table_width,
    H: tl.constexpr, W: tl.constexpr, R: tl.constexpr, C: tl.constexpr, S: tl.constexpr, PACK: tl.constexpr,
    CUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
    TOGETHER: tl.constexpr, MORE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the table's gradient over some keys of some images, for TOGETHER heads of one group, which share their hats.

    Per key it is hats_x @ gradient^T @ hats_y, where a hat is the weight of a table entry for a query; in a fixed order. The
    gradient of a map is one tile of ROWS x COLUMNS; or, CUT, down x across of them, which are units of the sum like keys.
    Where it fills a quarter of a tile, PACK = 2 keys lie on the tile's diagonal, in one product for both. With
    MORE, sums of an earlier launch are gone on with.
    Grid: (splits of all units, heads / TOGETHER, tiles of the table).
    """
    height = H if H > 0 else height
    width = W if W > 0 else width
    places = tl.cdiv(H, S * R) * tl.cdiv(W, C) * (S * R * C) if H > 0 else places
    head = tl.program_id(1) * TOGETHER
    group = head // (heads // groups)
    tiles_x = tl.cdiv(table_width, TILE_X)
    table_y = tl.program_id(2) // tiles_x * TILE_Y + tl.arange(0, TILE_Y)
    table_x = tl.program_id(2) % tiles_x * TILE_X + tl.arange(0, TILE_X)
    low: tl.constexpr = grad_logits.dtype.element_ty
    patches_down = tl.cdiv(height, S * R)
    patches_across = tl.cdiv(width, C)
    results = ()
    for h in tl.static_range(TOGETHER):
        if MORE:
            inside_table = (table_y < table_height)[None, :] & (table_x < table_width)[:, None]
            entry = (
                (head + h) * (table_height * table_width) + table_y[None, :] * table_width + table_x[:, None]
            )
            result = tl.load(
                partial + tl.program_id(0).to(tl.int64) * part + entry, mask=inside_table, other=0.0
            )
        else:
            result = tl.zeros([TILE_X, TILE_Y], tl.float32)
        results = results + (result,)
    # Rows of a patch in the order of its places, so that neighbours in memory are one thread's. Places past the map hold zeros.
    n = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    if PACK > 1:
        of_row = n // (ROWS // PACK)
        of_column = column // (COLUMNS // PACK)
        n -= of_row * (ROWS // PACK)
        column -= of_column * (COLUMNS // PACK)
    row = n // (S * R) * (S * R) + n % S * R + n // S % R
    place = (n // (S * R) * patches_across)[None, :] * (S * R * C) + (
        column // C * (S * R * C) + column % C * S
    )[:, None]
    place += (n // S % R * (C * S) + n % S)[None, :]
    if PACK > 1:
        place += of_row[None, :] * places
    per_image = tl.cdiv(n_keys, PACK)
    first = tl.program_id(0) * per_program
    for unit in range(first, tl.minimum(first + per_program, batch * per_image * (down * across))):
        pack = unit
        if CUT:
            tile = unit % (down * across)
            pack = unit // (down * across)
            first_row = tile // across * ROWS
            first_column = tile % across * COLUMNS
        image = (pack // per_image).to(tl.int64)
        key = pack % per_image * PACK
        here = starts + (image * groups + group) * n_keys + key
        if PACK == 1:
            packed = tl.load(here)
            y = _fp32(packed, 0) + offset_y
            x = _fp32(packed, 32) + offset_x
            if CUT:
                y += first_row.to(tl.float32) * step_y
                x += first_column.to(tl.float32) * step_x
            y += row.to(tl.float32) * step_y
            x += column.to(tl.float32) * step_x
        else:
            y = _fp32(tl.load(here + of_row, mask=key + of_row < n_keys, other=0), 0)
            y += offset_y + row.to(tl.float32) * step_y
            x = _fp32(tl.load(here + of_column, mask=key + of_column < n_keys, other=0), 32)
            x += offset_x + column.to(tl.float32) * step_x
        hats_x = _hat(x[None, :] - table_x.to(tl.float32)[:, None]).to(low)
        hats_y = _hat(y[:, None] - table_y.to(tl.float32)[None, :]).to(low)
        source = grad_logits + ((image * heads + head) * n_keys + key) * places
        patches_below = patches_down
        patches_right = patches_across
        if CUT:
            source += (first_row // (S * R) * patches_across + first_column // C) * (S * R * C)
            patches_below -= first_row // (S * R)
            patches_right -= first_column // C
        inside = (n // (S * R) < patches_below)[None, :] & (column // C < patches_right)[:, None]
        if PACK > 1:
            inside &= (of_row[None, :] == of_column[:, None]) & (key + of_row < n_keys)[None, :]
        sums = ()
        for h in tl.static_range(TOGETHER):
            grad = tl.load(source + place, mask=inside, other=0.0)
            half = tl.dot(hats_x, grad, input_precision=PRECISION).to(low)
            sums = sums + (tl.dot(half, hats_y, results[h], input_precision=PRECISION),)
            source += n_keys * places
        results = sums
    inside_table = (table_y < table_height)[None, :] & (table_x < table_width)[:, None]
    for h in tl.static_range(TOGETHER):
        target = partial + (tl.program_id(0).to(tl.int64) * part + (head + h) * (table_height * table_width))
        tl.store(target + table_y[None, :] * table_width + table_x[:, None], results[h], mask=inside_table)


@triton.jit(do_not_specialize=["parts", "entries", "table_programs", "positions", "coordinates", "share"])
def sums_kernel(
    partial, grad_table, grad_starts, grad_positions, parts, entries, table_programs, positions, coordinates, share,
    BLOCK_PARTS: tl.constexpr, BLOCK_ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The last sums, each in a fixed order: programs for the table's gradient, then for that of the positions."""
    program = tl.program_id(0)
    if program < table_programs:
        _sum_parts(program, partial, grad_table, parts, entries, BLOCK_PARTS, BLOCK_ENTRIES)
    else:
        _sum_heads(
            program - table_programs, grad_starts, grad_positions, positions, coordinates, share, BLOCK
        )


@triton.jit
def _sum_parts(
    program, partial, grad_table, parts, entries, BLOCK_PARTS: tl.constexpr, BLOCK_ENTRIES: tl.constexpr
):
    """Of parts x entries."""
    entry = program * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES)
    part = tl.arange(0, BLOCK_PARTS)
    at = part[:, None] * entries + entry[None, :]
    total = tl.zeros([BLOCK_PARTS, BLOCK_ENTRIES], tl.float32)
    for first in range(0, parts, BLOCK_PARTS):
        there = (part < parts - first)[:, None] & (entry < entries)[None, :]
        total += tl.load(partial + at, mask=there, other=0.0)
        partial += entries.to(tl.int64) * BLOCK_PARTS
    tl.store(grad_table + entry, tl.sum(total, 0), mask=entry < entries)


@triton.jit
def _sum_heads(program, grad_starts, grad_positions, positions, coordinates, share, BLOCK: tl.constexpr):
    """Of B x groups x share x coordinates, over the heads that share their positions."""
    i = program * BLOCK + tl.arange(0, BLOCK)
    valid = i < positions
    first = i // coordinates * share * coordinates + i % coordinates
    total = tl.zeros([BLOCK], tl.float32)
    for head in range(0, share):
        total += tl.load(grad_starts + first + head * coordinates, mask=valid, other=0.0)
    tl.store(grad_positions + i, total, mask=valid)
