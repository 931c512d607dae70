"""The ``triton`` backend: what is launched for a call (tiles and pieces: ``triton_tiles``; kernels: ``triton_kernels`` and beside it).

Forward keeps the output and the log-sum-exp; backward computes scores and bias again and writes the scores' gradient, B x heads
x keys x queries in the dtype of q, for as long as it takes to multiply it, in pieces of bounded size. Bias, softmax and all sums are
fp32; beside half-precision q, k, v the table is read as fp16 (11 bits of mantissa, as TF32 has), beside fp32 as fp32. No step depends
on the order in which programs run: the same inputs give the same bits, always.

``TRITON_INTERPRET=1`` runs the kernels on CPU tensors, for tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from dattrain.ops.deformable_attention.coordinates import Geometry, Inputs
from dattrain.ops.deformable_attention.layout import tokens_like, unit_stride
from dattrain.ops.deformable_attention.triton_gradients import (
    query_gradient_kernel,
    sums_kernel,
    table_gradient_kernel,
)
from dattrain.ops.deformable_attention.triton_kernels import backward_kernel, forward_kernel
from dattrain.ops.deformable_attention.triton_planes import Bias, Rows, prepare
from dattrain.ops.deformable_attention.triton_tiles import (
    Piece,
    TableTiles,
    Tiles,
    backward_tiles,
    forward_tiles,
    pieces,
    power,
)
from dattrain.ops.precision import products_of

QUERY_TILE = 64
"""Places, at most, whose gradient of q is one program's."""


def forward(inputs: Inputs, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Output (as q, laid out B x queries x heads x d in memory) and log-sum-exp (B x heads x queries, fp32)."""
    q, k, v, positions, table = inputs
    batch, heads, queries, dim = q.shape
    keys, groups = k.shape[2], positions.shape[1]
    lse = positions.new_empty(batch, heads, queries)
    if not batch:
        return tokens_like(q), lse
    q, k, v = (_padded(x) for x in (q, k, v))
    out = tokens_like(q)
    bias = prepare(positions, table, q, geometry)
    tiles = forward_tiles(q, table, geometry)
    forward_kernel[(batch * heads, *tiles.patches(geometry))](
        q, k, v, bias.starts, bias.planes, out, lse, heads, groups, keys, geometry.height, geometry.width, bias.pitch,
        bias.words, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *bias.step, geometry.scale,
        D=q.shape[-1], TAIL=tiles.tail(keys), **tiles.launch(), **bias.constants, **_precision(q),
    )  # fmt: skip
    return _narrowed(out, dim), lse


def backward(
    grad_out: Tensor, inputs: Inputs, out: Tensor, lse: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v (laid out B x length x heads x d in memory), positions and table."""
    q, k, v, positions, table = inputs
    batch, heads, _, dim = q.shape
    keys, groups = k.shape[2], positions.shape[1]
    if not batch:
        zeros = [torch.zeros_like(x) for x in (q, k, v, positions)]
        return zeros[0], zeros[1], zeros[2], zeros[3], None if table is None else torch.zeros_like(table)
    grad_out, q, k, v, out = (_padded(x) for x in (grad_out, q, k, v, out))
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    bias = prepare(positions, table, q, geometry, Rows(grad_out, out, delta))
    grad_q, grad_k, grad_v = (tokens_like(x) for x in (q, k, v))
    grad_starts = positions.new_empty(batch, heads, keys, 2)
    tiles = backward_tiles(q, table, geometry)
    places = tiles.places(geometry)
    all_pieces = pieces(batch, heads, groups, keys, places * q.element_size())
    scores = q.new_empty(k[all_pieces[0].keys].shape[:3].numel() * places)
    table_sums = None if table is None else _TableSums(table, all_pieces[0], heads // groups, q, geometry)
    for piece in all_pieces:
        some_k, some_bias = k[piece.keys], bias.of(piece)
        grad_logits = scores[: some_k.shape[:3].numel() * places].view(*some_k.shape[:3], places)
        of_queries = [x[piece.queries] for x in (grad_out, q, lse, delta)]
        of_keys = [x[piece.keys] for x in (k, v, grad_k, grad_v, grad_starts)]
        _scores_gradient(grad_logits, of_queries, of_keys, some_bias, tiles, geometry)
        if piece.key.start == 0:
            # Sums over keys that come in several pieces are kept in fp32.
            whole = piece.key.stop == keys
            sum_q = grad_q[piece.queries] if whole else tokens_like(grad_q[piece.queries], torch.float32)
        _query_gradient(grad_logits, some_k, sum_q, tiles, geometry, more=piece.key.start > 0)
        if piece.key.stop == keys and not whole:
            grad_q[piece.queries].copy_(sum_q)
        if table_sums is not None:
            table_sums.add(grad_logits, some_bias, piece, tiles)
    if table_sums is None:
        grad_table, grad_positions = None, torch.zeros_like(positions)
    else:
        grad_table, grad_positions = table_sums.finish(grad_starts, positions)
    grad_q, grad_k, grad_v = (_narrowed(x, dim) for x in (grad_q, grad_k, grad_v))
    return grad_q, grad_k, grad_v, grad_positions, grad_table


def _scores_gradient(
    grad_logits: Tensor,
    of_queries: Sequence[Tensor],
    of_keys: Sequence[Tensor],
    bias: Bias,
    tiles: Tiles,
    geometry: Geometry,
) -> None:
    """Fills ``grad_logits`` (B x heads x keys x places in the dtype of q), and ``grad_k``, ``grad_v`` and ``grad_starts``."""
    grad_out, q, lse, delta = of_queries
    k, v, grad_k, grad_v, grad_starts = of_keys
    batch, heads, keys, places = grad_logits.shape
    for first, count, block in tiles.launches(keys):
        backward_kernel[(batch * heads, count)](
            grad_out, q, k, v, bias.starts, bias.planes, lse, delta, grad_k, grad_v, grad_starts, grad_logits,
            heads, bias.starts.shape[1], keys, first, places, geometry.height, geometry.width, bias.pitch, bias.words,
            *grad_out.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_k.stride()[:3],
            *grad_v.stride()[:3], *bias.step, *bias.slope, geometry.scale, D=q.shape[-1],
            MASKED=first + count * block > keys, **tiles.launch(block), **bias.constants, **_precision(q),
        )  # fmt: skip


def _query_gradient(
    grad_logits: Tensor, k: Tensor, grad_q: Tensor, tiles: Tiles, geometry: Geometry, more: bool
) -> None:
    """Fills ``grad_q``, or adds to it."""
    batch, heads, keys, places = grad_logits.shape
    some = math.gcd(places, QUERY_TILE)  # no place past the last
    tiles = tiles._replace(BLOCK_K=32 if k.shape[-1] < 32 else 64)
    query_gradient_kernel[(batch * heads, places // some)](
        grad_logits, k, grad_q, heads, keys, places, geometry.height, geometry.width, *k.stride()[:3], *grad_q.stride()[:3],
        geometry.scale, D=k.shape[-1], BLOCK_Q=some, BLOCK_K=tiles.BLOCK_K, TAIL=tiles.tail(keys), MORE=more, **tiles.patch,
        num_warps=4 if some == QUERY_TILE else 2, num_stages=1, **_precision(k),
    )  # fmt: skip


class _TableSums:
    """The table's gradient in parts (splits x heads x Th x Tw, fp32), which each piece of the scores' gradient adds to."""

    def __init__(self, table: Tensor, first: Piece, share: int, q: Tensor, geometry: Geometry) -> None:
        """``first`` is the largest piece, ``share`` the heads of a group."""
        self.table, self.share, self.q, self.geometry = table, share, q, geometry
        tiles = self._tiles(first)
        units = self._units(tiles, first.images.stop - first.images.start, first.key.stop - first.key.start)
        self.splits = tiles.splits(units, table.shape[0])
        self.parts = table.new_empty(self.splits, *table.shape)

    def _tiles(self, piece: Piece) -> TableTiles:
        share = min(self.share, piece.heads.stop - piece.heads.start)
        return TableTiles.of(self.table, self.geometry, share, self.q)

    def _units(self, tiles: TableTiles, images: int, keys: int) -> int:
        return images * int(triton.cdiv(keys, tiles.PACK)) * math.prod(tiles.cuts(self.geometry))

    def add(self, grad_logits: Tensor, bias: Bias, piece: Piece, tiles: Tiles) -> None:
        batch, heads, keys, places = grad_logits.shape
        geometry = self.geometry
        table_tiles = self._tiles(piece)
        per_program = triton.cdiv(self._units(table_tiles, batch, keys), self.splits)
        table_gradient_kernel[(self.splits, heads // table_tiles.TOGETHER, table_tiles.tiles)](
            grad_logits, bias.starts, self.parts[:, piece.heads], batch, heads, bias.starts.shape[1], keys, places,
            geometry.height, geometry.width, per_program, *table_tiles.cuts(geometry), self.parts.stride(0), *bias.step, *bias.offset,
            *self.table.shape[1:], MORE=piece.images.start + piece.key.start > 0, PRECISION="tf32x3", **tiles.patch, **table_tiles.launch(),
        )  # fmt: skip

    def finish(self, grad_starts: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of table and positions, the latter from each head's share of it."""
        grad_table = self.table.new_empty(self.table.shape)
        grad_positions = positions.new_empty(positions.shape)
        coordinates = positions.shape[2] * 2
        table_programs = triton.cdiv(grad_table.numel(), 32)
        sums_kernel[(table_programs + triton.cdiv(positions.numel(), 256),)](
            self.parts, grad_table, grad_starts, grad_positions, self.splits, grad_table.numel(), table_programs,
            positions.numel(), coordinates, self.share, BLOCK_PARTS=32, BLOCK_ENTRIES=32, BLOCK=256,
        )  # fmt: skip
        return grad_table, grad_positions


def _padded(x: Tensor) -> Tensor:
    """With a head dim that the kernels take (a power of two from 16), zeros added, and unit stride along it."""
    missing = power(x.shape[-1]) - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else unit_stride(x)


def _narrowed(x: Tensor, dim: int) -> Tensor:
    """The first ``dim`` of the head's dims, laid out as tokens."""
    return x if x.shape[-1] == dim else x[..., :dim].transpose(1, 2).contiguous().transpose(1, 2)


def _precision(q: Tensor) -> dict[str, str]:
    return {"PRECISION": products_of(q)}
