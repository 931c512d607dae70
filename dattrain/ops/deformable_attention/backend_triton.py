"""The ``triton`` backend: what is launched for a call, with which tiles (the kernels are in ``triton_kernels``).

Forward keeps the output and the log-sum-exp; backward computes scores and bias again and writes the scores' gradient, B x heads
x keys x queries in the dtype of q, for as long as it takes to multiply it. Bias, softmax and all sums are fp32; beside half-precision
q, k, v the table is read as fp16 (11 bits of mantissa, as TF32 has), beside fp32 as fp32. No step depends on the order
in which programs run: the same inputs give the same bits, always.

``TRITON_INTERPRET=1`` runs the kernels on CPU tensors, for tests.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from dattrain.ops.deformable_attention import triton_kernels as kernels
from dattrain.ops.deformable_attention.coordinates import Geometry, Inputs
from dattrain.ops.deformable_attention.layout import tokens_like, unit_stride
from dattrain.ops.deformable_attention.triton_planes import Bias
from dattrain.ops.precision import products_of


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
    bias = Bias.of(positions, table, q, geometry)
    tiles = forward_tiles(q, geometry.width)
    kernels.forward_kernel[(batch * heads, tiles.patches(geometry))](
        q, k, v, bias.starts, bias.planes, out, lse, heads, groups, keys,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *bias.step, geometry.scale,
        H=geometry.height, W=geometry.width, D=q.shape[-1], TAIL=tiles.tail(keys), **tiles.launch(), **bias.constants, **_precision(q),
    )  # fmt: skip
    return _narrowed(out, dim), lse


def backward(
    grad_out: Tensor, inputs: Inputs, out: Tensor, lse: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v (laid out B x length x heads x d in memory), positions and table."""
    q, k, v, positions, table = inputs
    batch, heads, _, dim = q.shape
    keys, groups = k.shape[2], positions.shape[1]
    grad_positions = torch.zeros_like(positions)
    grad_table = None if table is None else torch.zeros_like(table)
    if not batch:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), grad_positions, grad_table
    grad_out, q, k, v, out = (_padded(x) for x in (grad_out, q, k, v, out))
    lse = lse.contiguous()
    grad_q, grad_k, grad_v = (tokens_like(x) for x in (q, k, v))
    grad_starts = positions.new_empty(batch, heads, keys, 2)
    bias = Bias.of(positions, table, q, geometry)
    tiles = backward_tiles(q, geometry.width)
    bytes_per_image = heads * keys * tiles.places(geometry) * q.element_size()
    some = max(1, SCORES_BYTES // bytes_per_image)
    for first in range(0, batch, some):
        images = slice(first, first + some)
        grad_logits = _scores_gradient(
            grad_out[images], q[images], k[images], v[images], out[images], lse[images], grad_k[images], grad_v[images],
            grad_starts[images], bias.of_images(images), tiles, geometry,
        )  # fmt: skip
        _query_gradient(grad_logits, k[images], grad_q[images], tiles, geometry)
        if grad_table is not None:
            grad_table += _table_gradient(grad_logits, bias.of_images(images), grad_table, tiles, geometry)
    if table is not None:
        grad_positions = grad_starts.view(batch, groups, heads // groups, keys, 2).sum(2)
    grad_q, grad_k, grad_v = (_narrowed(x, dim) for x in (grad_q, grad_k, grad_v))
    return grad_q, grad_k, grad_v, grad_positions, grad_table


SCORES_BYTES = 512 << 20
"""Bytes of the scores' gradient, at most, at a time; one image's where that is more."""
QUERY_TILE = 64
"""Places, at most, whose gradient of q is one program's."""
SPLITS = 1024
"""Programs, about, that the (image, key) pairs of a table's gradient are spread over."""


def _scores_gradient(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_starts: Tensor,
    bias: Bias,
    tiles: Tiles,
    geometry: Geometry,
) -> Tensor:
    """B x heads x keys x places in the dtype of q; ``grad_k``, ``grad_v`` and ``grad_starts`` are filled."""
    batch, heads, queries, dim = q.shape
    keys, groups = k.shape[2], bias.starts.shape[1]
    delta = torch.empty_like(lse)
    grad_logits = q.new_empty(batch, heads, keys, tiles.places(geometry))
    kernels.delta_kernel[(batch * heads, triton.cdiv(queries, 64))](
        grad_out, out, delta, heads, queries, *grad_out.stride()[:3], *out.stride()[:3], D=dim, BLOCK=64
    )
    for first, count, block in tiles.launches(keys):
        kernels.backward_kernel[(batch * heads, count)](
            grad_out, q, k, v, bias.starts, bias.planes, lse, delta, grad_k, grad_v, grad_starts, grad_logits,
            heads, groups, keys, first, *grad_out.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *grad_k.stride()[:3], *grad_v.stride()[:3], *bias.step, *bias.slope, geometry.scale, H=geometry.height, W=geometry.width, D=dim,
            MASKED=first + count * block > keys, **tiles.launch(block), **bias.constants, **_precision(q),
        )  # fmt: skip
    return grad_logits


def _query_gradient(grad_logits: Tensor, k: Tensor, grad_q: Tensor, tiles: Tiles, geometry: Geometry) -> None:
    batch, heads, keys, places = grad_logits.shape
    some = math.gcd(places, QUERY_TILE)  # no place past the last
    tiles = tiles._replace(BLOCK_K=32 if k.shape[-1] < 32 else 64)
    kernels.query_gradient_kernel[(batch * heads, places // some)](
        grad_logits, k, grad_q, heads, keys, *k.stride()[:3], *grad_q.stride()[:3], geometry.scale, H=geometry.height, W=geometry.width,
        D=k.shape[-1], PLACES=places, BLOCK_Q=some, BLOCK_K=tiles.BLOCK_K, TAIL=tiles.tail(keys), **tiles.patch,
        num_warps=4 if some == QUERY_TILE else 2, num_stages=1, **_precision(k),
    )  # fmt: skip


def _table_gradient(
    grad_logits: Tensor,
    bias: Bias,
    table: Tensor,
    tiles: Tiles,
    geometry: Geometry,
) -> Tensor:
    """As ``table`` (heads x Th x Tw, fp32)."""
    batch, heads, keys, places = grad_logits.shape
    groups = bias.starts.shape[1]
    half = grad_logits.element_size() == 2
    rows, columns = (min(64 if half else 32, _power(n)) for n in (geometry.height, geometry.width))
    tile_y, tile_x = (min(64 if half else 32, _power(n)) for n in table.shape[1:])
    parts = triton.cdiv(table.shape[1], tile_y) * triton.cdiv(table.shape[2], tile_x)
    # As many heads as share positions and fit into registers; warps and programs as an H100 was fastest with.
    tile = max(tile_y, tile_x)
    most = (4 if tile <= 32 else 2) if half else 1
    together = max(n for n in range(1, most + 1) if heads // groups % n == 0)
    warps = 4 if tile > 32 else 1 if half else 2
    limited = tile > 32 and together > 1 and capability(grad_logits.device) == 9
    limit = {"maxnreg": 128 if rows * columns <= 1024 else 168} if limited else {}
    splits = max(1, min(batch * keys, SPLITS * (2 if tile <= 16 else 1) * together // heads))
    partial = table.new_empty(splits, *table.shape)
    kernels.table_gradient_kernel[(splits, heads // together, parts)](
        grad_logits, bias.starts, partial, batch, heads, groups, keys, triton.cdiv(batch * keys, splits), *bias.step,
        *bias.offset, *table.shape[1:], H=geometry.height, W=geometry.width, PLACES=places, ROWS=rows, COLUMNS=columns, TILE_Y=tile_y,
        TILE_X=tile_x, TOGETHER=together, num_warps=warps, num_stages=1,
        PRECISION="tf32x3", **limit, **tiles.patch,
    )  # fmt: skip
    return partial.sum(0)


class Tiles(NamedTuple):
    """Patches of ``S`` sub-tiles of R rows and C columns of queries, times BLOCK_K keys."""

    R: int
    C: int
    S: int
    BLOCK_K: int
    num_warps: int
    registers: int | None = None
    """Of a thread, at most, so that a multiprocessor holds one block more."""

    def patches(self, geometry: Geometry) -> int:
        """How many cover a map."""
        return int(triton.cdiv(geometry.height, self.R * self.S) * triton.cdiv(geometry.width, self.C))

    def places(self, geometry: Geometry) -> int:
        """Queries in them, those past the map included."""
        return self.patches(geometry) * self.R * self.C * self.S

    @property
    def patch(self) -> dict[str, int]:
        """Its constants."""
        return {"R": self.R, "C": self.C, "S": self.S}

    def tail(self, keys: int) -> int:
        """Size of the tile for the keys past the last full one, 0 for none."""
        return _power(keys % self.BLOCK_K) if keys % self.BLOCK_K else 0

    def launches(self, keys: int) -> list[tuple[int, int, int]]:
        """(first key, tiles, keys per tile): full tiles, then what is left over."""
        whole, rest = keys // self.BLOCK_K, self.tail(keys)
        runs = [(0, whole, self.BLOCK_K), (whole * self.BLOCK_K, int(rest > 0), rest)]
        return [run for run in runs if run[1]]

    def launch(self, block: int | None = None) -> dict[str, int]:
        """Constants of a launch; a smaller tile of keys takes fewer warps."""
        block = block or self.BLOCK_K
        warps = max(1, self.num_warps * block // self.BLOCK_K)
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {**self.patch, "BLOCK_K": block, "num_warps": warps, "num_stages": 1, **limit}


def forward_tiles(q: Tensor, width: int) -> Tiles:
    """Chosen by what an H100 took with them: docs/benchmarks/h100.md."""
    if q.element_size() == 2:
        return Tiles(*_patch(width), S=4, BLOCK_K=32, num_warps=4, registers=_at_most(80, q))
    narrow = q.shape[-1] <= 32
    return Tiles(*_patch(width), S=2 if narrow else 1, BLOCK_K=32 if narrow else 16, num_warps=4)


def backward_tiles(q: Tensor, width: int) -> Tiles:
    """The same for backward."""
    some = 2 if q.shape[-1] <= 32 else 1
    return Tiles(*_patch(width), S=some, BLOCK_K=64, num_warps=4, registers=_at_most(168, q))


def _at_most(registers: int, q: Tensor) -> int | None:
    """A limit that was chosen by the clock on compute capability 9.0 holds there: on 8.x, for one, forward spills with it."""
    return registers if q.element_size() == 2 and q.shape[-1] <= 32 and capability(q.device) == 9 else None


def capability(device: torch.device) -> int:
    """Compute capability, the major number; 0 in the interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _patch(width: int) -> tuple[int, int]:
    # 7, 24, 56: columns of 8 waste less than columns of 16.
    return (2, 8) if width % 16 in range(1, 9) else (1, 16)


def _power(n: int) -> int:
    """The least power of two that a matrix product takes."""
    return max(16, int(triton.next_power_of_2(n)))


def _padded(x: Tensor) -> Tensor:
    """With a head dim that the kernels take (a power of two from 16), zeros added, and unit stride along it."""
    missing = _power(x.shape[-1]) - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else unit_stride(x)


def _narrowed(x: Tensor, dim: int) -> Tensor:
    """The first ``dim`` of the head's dims, laid out as tokens."""
    return x if x.shape[-1] == dim else x[..., :dim].transpose(1, 2).contiguous().transpose(1, 2)


def _precision(q: Tensor) -> dict[str, str]:
    return {"PRECISION": products_of(q)}
