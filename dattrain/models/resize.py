"""Tables of position biases at another size. Which tensor of a model needs it is decided in ``surgery`` and ``dat``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_table(table: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic resize of a table of relative displacements, as the authors and Swin do before fine-tuning at 384.

    Args:
        table: heads x Th x Tw, any float dtype.
        size: new (Th, Tw).

    Returns:
        heads x size, dtype of ``table``; computed in fp32 or better. ``table`` itself when the size is the same.
    """
    if tuple(table.shape[1:]) == tuple(size):
        return table
    wide = table.to(torch.promote_types(table.dtype, torch.float32))[None]
    return F.interpolate(wide, size, mode="bicubic", align_corners=False)[0].to(table.dtype)


def resize_fixed_table(table: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Bicubic resize of one bias per (query, key) pair: along the queries' map, then along the keys'.

    Args:
        table: heads x (Hq*Wq) x (Hk*Wk).
        old, new: (Hq, Wq, Hk, Wk) of the table and of the result.

    Returns:
        heads x (Hq*Wq) x (Hk*Wk) at the new size, dtype of ``table``; computed in fp32 or better.
    """
    if tuple(old) == tuple(new):
        return table
    heads, keys = table.shape[0], old[2] * old[3]
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    by_key = wide.transpose(1, 2).reshape(heads, keys, *old[:2])
    by_key = F.interpolate(by_key, tuple(new[:2]), mode="bicubic", align_corners=False).flatten(2)
    by_query = by_key.transpose(1, 2).reshape(heads, -1, *old[2:])
    out = F.interpolate(by_query, tuple(new[2:]), mode="bicubic", align_corners=False)
    return out.flatten(2).to(table.dtype)
