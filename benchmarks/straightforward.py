"""Deformable attention's core in the straightforward way: what the benches compare ``dattrain.ops`` with.

The displacement of every query and key is written out, the bias is read from it by ``grid_sample``, and scores, bias and
softmax are whole matrices, at the precision that autocast gives them. Not part of the package.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def deform_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    bias_table: Tensor | None,
    *,
    height: int,
    width: int,
    query_grid: str = "center",
    scale: float | None = None,
    backend: Any = None,
) -> Tensor:
    """``dattrain.ops.deform_attention`` with everything materialised; ``backend`` is taken and has no meaning."""
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias_table is not None:
        scores = scores + bias(positions, bias_table, height, width, query_grid)
    return torch.einsum("bhqk,bhkd->bhqd", F.softmax(scores, -1).to(v.dtype), v)


def bias(positions: Tensor, bias_table: Tensor, height: int, width: int, query_grid: str) -> Tensor:
    """The bias of every query and key, B x heads x (height*width) x Ns, in the dtype of ``positions``."""
    batch, groups, keys = positions.shape[:3]
    heads, queries = len(bias_table), height * width
    axes = []
    for size in (height, width):
        index = torch.arange(size, device=positions.device, dtype=positions.dtype)
        center = (index + 0.5) / size * 2 - 1
        axes.append(center if query_grid == "center" else index / max(size - 1, 1) * 2 - 1)
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(1, queries, 1, 2)
    displacement = (grid - positions.reshape(batch * groups, 1, keys, 2)) * 0.5
    tables = bias_table.reshape(1, groups, heads // groups, *bias_table.shape[1:]).expand(
        batch, -1, -1, -1, -1
    )
    sampled = F.grid_sample(
        tables.reshape(batch * groups, heads // groups, *bias_table.shape[1:]),
        displacement[..., (1, 0)],
        mode="bilinear",
        align_corners=True,
    )
    return sampled.reshape(batch, heads, queries, keys)
