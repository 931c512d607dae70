"""The attention core as others would write it today: a materialised bias given to SDPA, and FlexAttention with a score_mod."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import straightforward


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor,
    *,
    height: int,
    width: int,
    query_grid: str,
) -> Tensor:
    """``dattrain.ops.deform_attention``: the bias is sampled into memory in fp32, cast, and given as a mask."""
    bias = straightforward.bias(positions, table, height, width, query_grid)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor,
    *,
    height: int,
    width: int,
    query_grid: str,
) -> Tensor:
    """The same, the bias sampled per score inside FlexAttention; compiled on CUDA, forward alone and written out elsewhere.

    Gradients of what a score_mod reads are atomic adds (pytorch#137452).
    """
    share = q.shape[1] // positions.shape[1]
    rows, columns = table.shape[1:]

    def axis(index: Tensor, size: int) -> Tensor:
        return (index + 0.5) / size * 2 - 1 if query_grid == "center" else index / max(size - 1, 1) * 2 - 1

    def score_mod(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        group = h // share
        y = ((axis(query // width, height) - positions[b, group, key, 0]) * 0.5 + 1) * 0.5 * (rows - 1)
        x = ((axis(query % width, width) - positions[b, group, key, 1]) * 0.5 + 1) * 0.5 * (columns - 1)
        top, left = torch.floor(y), torch.floor(x)
        down, right = y - top, x - left

        def tap(i: Tensor, j: Tensor) -> Tensor:
            inside = (i >= 0) & (i < rows) & (j >= 0) & (j < columns)
            at = i.clamp(0, rows - 1).to(torch.int32), j.clamp(0, columns - 1).to(torch.int32)
            return torch.where(inside, table[h, at[0], at[1]], 0.0)

        above = tap(top, left) * (1 - right) + tap(top, left + 1) * right
        below = tap(top + 1, left) * (1 - right) + tap(top + 1, left + 1) * right
        return score + above * (1 - down) + below * down

    out: Tensor = _flex(q.is_cuda)(q, k, v, score_mod=score_mod)
    return out


@lru_cache
def _flex(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    call: Callable[..., Any] = flex_attention
    return torch.compile(call, dynamic=False) if compiled else call
