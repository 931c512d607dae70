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
    batch, heads, queries, dim = q.shape
    groups, keys = positions.shape[1:3]
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * (dim**-0.5 if scale is None else scale)
    if bias_table is not None:
        axes = []
        for size in (height, width):
            index = torch.arange(size, device=q.device, dtype=positions.dtype)
            center = (index + 0.5) / size * 2 - 1
            axes.append(center if query_grid == "center" else index / max(size - 1, 1) * 2 - 1)
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(1, queries, 1, 2)
        displacement = (grid - positions.reshape(batch * groups, 1, keys, 2)) * 0.5
        tables = bias_table.reshape(1, groups, heads // groups, *bias_table.shape[1:]).expand(
            batch, -1, -1, -1, -1
        )
        bias = F.grid_sample(
            tables.reshape(batch * groups, heads // groups, *bias_table.shape[1:]),
            displacement[..., (1, 0)],
            mode="bilinear",
            align_corners=True,
        )
        scores = scores + bias.reshape(batch, heads, queries, keys)
    return torch.einsum("bhqk,bhkd->bhqd", F.softmax(scores, -1).to(v.dtype), v)
