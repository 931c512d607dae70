"""The equations of deformable attention as plain torch, every matrix materialised: the oracle, not the fast path."""

from __future__ import annotations

import torch
from torch import Tensor

from dattrain.ops import sampling, transforms
from dattrain.ops.deformable_attention.coordinates import Geometry, Inputs, QueryGrid, query_coordinates


def sampled_bias(bias_table: Tensor, positions: Tensor, height: int, width: int, grid: QueryGrid) -> Tensor:
    """The table read bilinearly at every displacement.

    Args:
        bias_table: heads x Th x Tw.
        positions: B x groups x Ns x 2 (y, x), normalised.

    Returns:
        B x heads x (height*width) x Ns, in the dtype of ``bias_table``.
    """
    batch, groups, keys, _ = positions.shape
    heads, table_height, table_width = bias_table.shape
    y = query_coordinates(height, grid, device=positions.device, dtype=positions.dtype)
    x = query_coordinates(width, grid, device=positions.device, dtype=positions.dtype)
    query = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).view(1, 1, height * width, 1, 2)
    displacement = (query - positions.unsqueeze(2)) / 2
    if transforms.under_way():  # the sampler below has no forward mode
        map_ = bias_table.permute(1, 2, 0).expand(batch, -1, -1, -1)
        bias = sampling.gather(map_, displacement.flatten(2, 3).to(map_.dtype))
        return bias.view(batch, height * width, keys, heads).permute(0, 3, 1, 2)
    tables = bias_table.view(1, groups, heads // groups, table_height, table_width)
    tables = tables.expand(batch, -1, -1, -1, -1).flatten(0, 1)
    places = displacement.flip(-1).flatten(0, 1).to(tables.dtype)
    # Bilinear, zeros outside, corners aligned. F.grid_sample on CUDA is cuDNN's, whose gradient has no fixed order of
    # summation and does not say so under use_deterministic_algorithms; this one raises there.
    bias = torch.ops.aten.grid_sampler_2d(tables, places, 0, 0, True)
    out: Tensor = bias.view(batch, heads, height * width, keys)
    return out


def deform_attention(inputs: Inputs, geometry: Geometry) -> Tensor:
    """softmax(scale * q k^T + bias) v as q, logits and softmax in the dtype of ``positions``; differentiable by torch."""
    q, k, v, positions, table = inputs
    accumulate = positions.dtype
    logits = (q.to(accumulate) @ k.to(accumulate).transpose(-2, -1)) * geometry.scale
    if table is not None:
        logits = logits + sampled_bias(
            table.to(accumulate), positions, geometry.height, geometry.width, geometry.grid
        )
    return (torch.softmax(logits, dim=-1) @ v.to(accumulate)).to(q.dtype)
