"""The ``torch`` backend: plain torch on any device, block by block, in memory that is used over and over.

A block is some images, the heads of one group and some query rows. Its scores are key-major, images x Ns x heads x
queries: a key's bias is then one contiguous run, and ``embedding_bag`` (a weighted sum of table rows: the one gather
that runs at memory speed on CPUs) can write it. Nothing of size queries x Ns outlives its block; backward builds
it again. How the bias is built is ``dattrain.ops.deformable_attention.torch_bias``; why, ``docs/design/kernel.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dattrain.ops.deformable_attention.coordinates import Geometry, Inputs
from dattrain.ops.deformable_attention.layout import tokens_like
from dattrain.ops.deformable_attention.torch_bias import BlockBias, bias_builder

BLOCK_BYTES = 3 << 20
"""Target size of one block's scores: several such matrices fit into a last-level cache."""


class _Block(NamedTuple):
    """Some images, the heads of a group, some queries."""

    images: slice
    heads: slice
    queries: slice
    group: int
    bias: BlockBias | None

    def of_queries(self, x: Tensor) -> Tensor:
        """A view: c x heads x queries x d."""
        return x[self.images, self.heads, self.queries]

    def of_keys(self, x: Tensor) -> Tensor:
        """A view: c x heads x Ns x d."""
        return x[self.images, self.heads]


class _Scratch:
    """Memory by name that grows to the largest block and is then reused: fresh pages cost more than arithmetic."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._memory: dict[str, Tensor] = {}

    def get(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self._memory or self._memory[name].numel() < size:
            self._memory[name] = self._like.new_empty(size)
        return self._memory[name][:size].view(shape)


def forward(inputs: Inputs, geometry: Geometry) -> Tensor:
    """softmax(scale * q k^T + bias) v."""
    q, k, v, positions, table = inputs
    out = tokens_like(q)
    dtype = positions.dtype
    scratch = _Scratch(positions)
    for block in _blocks(q, positions, table, geometry):
        keys, queries = block.of_keys(k).to(dtype), block.of_queries(q).to(dtype)
        weights = _softmax(block, keys, queries, geometry.scale, scratch)
        _over_keys(weights, block.of_keys(v).to(dtype), block.of_queries(out))
    return out


def backward(
    grad_out: Tensor, inputs: Inputs, out: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v (in their dtype), positions and table (in theirs)."""
    q, k, v, positions, table = inputs
    dtype, device = positions.dtype, q.device
    grad_q, grad_k, grad_v = tokens_like(q), tokens_like(k, dtype).zero_(), tokens_like(v, dtype).zero_()
    grad_positions = torch.zeros(positions.shape, dtype=dtype, device=device)
    grad_table = None if table is None else torch.zeros(table.shape, dtype=dtype, device=device)
    scratch = _Scratch(positions)
    for block in _blocks(q, positions, table, geometry, grad_table):
        keys, values = block.of_keys(k).to(dtype), block.of_keys(v).to(dtype)
        queries, grads = block.of_queries(q).to(dtype), block.of_queries(grad_out).to(dtype)
        weights = _softmax(block, keys, queries, geometry.scale, scratch)
        # Row sums of weights * grad_weights, from the output alone (Dao et al. 2022, appendix B.2).
        delta = (grads * block.of_queries(out).to(dtype)).sum(-1)
        _over_queries(weights, grads, block.of_keys(grad_v), 1.0)
        grad_scores = _products(values, grads, 1.0, scratch.get("scores", *weights.shape), add=False)
        grad_scores.sub_(delta.unsqueeze(1)).mul_(weights)
        _over_queries(grad_scores, queries, block.of_keys(grad_k), geometry.scale)
        _over_keys(grad_scores, keys, block.of_queries(grad_q), geometry.scale)
        if block.bias is not None:
            grad_positions[block.images, block.group] += block.bias.backward(grad_scores)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_positions, grad_table


def _softmax(block: _Block, keys: Tensor, queries: Tensor, scale: float, scratch: _Scratch) -> Tensor:
    """Weights of the block, c x Ns x heads x queries."""
    images, heads, length, _ = queries.shape
    shape = (images, keys.shape[2], heads, length)
    scores = (
        scratch.get("scores", *shape)
        if block.bias is None
        else block.bias.forward(scratch.get("scores", *shape))
    )
    _products(keys, queries, scale, scores, add=block.bias is not None)
    return torch.softmax(scores, 1, out=scratch.get("weights", *shape))


def _products(keys: Tensor, queries: Tensor, scale: float, into: Tensor, *, add: bool) -> Tensor:
    """Scalar products of c x heads x Ns x d and c x heads x n x d, c x Ns x heads x n."""
    for i in range(into.shape[0]):
        into[i].transpose(0, 1).baddbmm_(keys[i], queries[i].transpose(1, 2), beta=float(add), alpha=scale)
    return into


def _over_keys(weights: Tensor, keys: Tensor, into: Tensor, scale: float = 1.0) -> None:
    """Sum over keys of weights (c x Ns x heads x n) times c x heads x Ns x d."""
    for i in range(weights.shape[0]):
        into[i] = torch.bmm(weights[i].permute(1, 2, 0), keys[i]).mul_(scale)


def _over_queries(weights: Tensor, queries: Tensor, into: Tensor, scale: float) -> None:
    """Add the sum over queries of weights (c x Ns x heads x n) times c x heads x n x d."""
    for i in range(weights.shape[0]):
        into[i].baddbmm_(weights[i].transpose(0, 1), queries[i], alpha=scale)


def _blocks(
    q: Tensor,
    positions: Tensor,
    table: Tensor | None,
    geometry: Geometry,
    grad_table: Tensor | None = None,
) -> Iterator[_Block]:
    """All blocks in turn. After a group's last block its share of the table's gradient is added to ``grad_table``."""
    batch, heads = q.shape[:2]
    height, width = geometry.height, geometry.width
    groups, keys = positions.shape[1:3]
    per_group = heads // groups
    row_bytes = per_group * keys * width * positions.element_size()
    rows = max(1, min(height, BLOCK_BYTES // row_bytes))
    rows = -(-height // -(-height // rows))
    images = max(1, min(batch, BLOCK_BYTES // (row_bytes * rows)))
    for group in range(groups if batch else 0):
        group_heads = slice(group * per_group, (group + 1) * per_group)
        for first in range(0, height, rows):
            last = min(first + rows, height)
            builder = None
            if table is not None:
                builder = bias_builder(
                    table[group_heads], positions[:, group], height, width, slice(first, last), geometry.grid
                )
            for image in range(0, batch, images):
                chunk = slice(image, min(image + images, batch))
                bias = None if builder is None else builder.block(positions[chunk, group])
                yield _Block(chunk, group_heads, slice(first * width, last * width), group, bias)
            if builder is not None and grad_table is not None:
                grad_table[group_heads] += builder.table_gradient()
