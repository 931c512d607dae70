"""Memory layouts: what the core's results have, and what kernels ask for."""

from __future__ import annotations

import torch
from torch import Tensor


def tokens_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised B x heads x length x d, laid out B x length x heads x d: a view back to tokens is free."""
    batch, heads, length, dim = x.shape
    return x.new_empty((batch, length, heads, dim), dtype=dtype).transpose(1, 2)


def unit_stride(x: Tensor) -> Tensor:
    """``x``, its last axis contiguous; copied only where it was not."""
    return x if x.stride(-1) == 1 else x.contiguous()
