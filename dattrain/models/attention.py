"""Attention over windows and over reduced maps, on B x H x W x C maps. Deformable attention is in ``deformable``.

A bias table of relative displacements is heads x (2h - 1) x (2w - 1) everywhere, read at query - key + (h - 1, w - 1).
"""

from __future__ import annotations

from math import ceil
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dattrain import ops
from dattrain.models.blocks import Interior, PatchConv, to_autocast_dtype
from dattrain.models.init import init_table
from dattrain.ops import transforms

Shift = Literal["ceil", "floor"]

MASKED = -100.0
"""Logit added between tokens which the shift made neighbours (Swin's and the authors' value)."""


def relative_bias(table: Tensor, height: int, width: int) -> Tensor:
    """Dense bias of every (query, key) pair of a height x width map.

    Overlapping windows of the table, so neither an index buffer nor an atomic scatter in the backward pass.

    Args:
        table: heads x (2 height - 1) x (2 width - 1).

    Returns:
        heads x (height*width) x (height*width), dtype of ``table``.
    """
    windows = table.unfold(1, height, 1).unfold(2, width, 1)
    return windows.flip(3, 4).reshape(table.shape[0], height * width, height * width)


def shift_mask(
    height: int, width: int, window: tuple[int, int], shift: tuple[int, int], device: torch.device
) -> Tensor:
    """Mask of shifted windows: -100 between tokens that come from different regions of the map before the roll.

    Args:
        height, width: of the padded map, multiples of the window.

    Returns:
        windows x area x area, fp32.
    """
    # Only windows at the bottom and at the right hold tokens from both sides of the map: the last ``by`` were first.
    rows, columns = (
        torch.arange(size, device=device) >= size - by for size, by in zip((height, width), shift)
    )
    region = (rows[:, None] * 2 + columns).view(height // window[0], window[0], width // window[1], window[1])
    region = region.transpose(1, 2).reshape(-1, window[0] * window[1])
    return (region[:, :, None] != region[:, None, :]).float() * MASKED


class WindowAttention(Interior):
    """Local attention in windows, with Swin's relative position bias; shifted by half a window when asked.

    Maps that the window does not divide are padded with zeros at right and bottom after the normalisation, without
    masking the padded keys, and cropped afterwards (the authors' detection code).

    Args:
        window: (height, width).
        shift: None, or how half a window is rounded: ``ceil`` in the authors' code (4 of 7), ``floor`` in Swin.
    """

    def __init__(
        self, dim: int, heads: int, window: tuple[int, int], shift: Shift | None = None, drop: float = 0.0
    ) -> None:
        super().__init__()
        self.heads = heads
        self.shift = shift
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(drop)
        self.window = window
        self.bias_table = nn.Parameter(torch.empty(heads, 2 * window[0] - 1, 2 * window[1] - 1))
        init_table(self.bias_table)

    @property
    def shift_size(self) -> tuple[int, int]:
        """Rows and columns by which the map is rolled."""
        if self.shift is None:
            return (0, 0)
        height, width = self.window
        return (ceil(height / 2), ceil(width / 2)) if self.shift == "ceil" else (height // 2, width // 2)

    def core_flops(self, height: int, width: int) -> int:
        """Multiply-accumulates of q k^T and of the weighted sum for one height x width map."""
        area = self.window[0] * self.window[1]
        padded = ceil(height / self.window[0]) * ceil(width / self.window[1]) * area
        return 2 * padded * area * self.proj.in_features

    def forward(self, x: Tensor) -> Tensor:
        """B x H x W x C to the same."""
        _, height, width, _ = x.shape
        (wh, ww), (sh, sw) = self.window, self.shift_size
        x = to_autocast_dtype(x)
        if height % wh or width % ww or transforms.tracing():  # other sizes of a trace may need it
            x = F.pad(x, (0, 0, 0, -width % ww, 0, -height % wh))
        if sh or sw:
            x = x.roll((-sh, -sw), (1, 2))
        batch, padded_height, padded_width, dim = x.shape
        rows, columns = padded_height // wh, padded_width // ww
        x = x.reshape(batch, rows, wh, columns, ww, dim).transpose(2, 3)
        x = x.reshape(batch, rows * columns, wh * ww, dim)
        mask = self._shift_mask(padded_height, padded_width, x.device) if sh or sw else None
        x = self._run_interior(self.qkv(x), mask)
        x = (
            x.view(batch, rows, columns, wh, ww, dim)
            .transpose(2, 3)
            .reshape(batch, padded_height, padded_width, dim)
        )
        if sh or sw:
            x = x.roll((sh, sw), (1, 2))
        return x[:, :height, :width]

    def _interior(self, qkv: Tensor, mask: Tensor | None) -> Tensor:
        """Attention within each window and the output projection; qkv is B x windows x area x 3C."""
        bias = relative_bias(self.bias_table, *self.window)
        out = ops.window_attention(qkv, bias, mask, self.heads)
        projected: Tensor = self.drop(self.proj(out))
        return projected

    def _shift_mask(self, height: int, width: int, device: torch.device) -> Tensor:
        # Made anew at every call, a few kernels on little memory: one that is kept must belong to no mode, trace, thread
        # or CUDA graph.
        return shift_mask(height, width, self.window, self.shift_size, device)


class SpatialReductionAttention(Interior):
    """Global attention to a map reduced by a strided convolution (PVT): the ``P`` of the paper's Table 6.

    Args:
        reduction: side of the patches that become one key; 1 attends to every token.
    """

    def __init__(self, dim: int, heads: int, reduction: int, drop: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.reduction = reduction
        self.q = nn.Linear(dim, dim)
        self.reduce = nn.Identity() if reduction == 1 else PatchConv(dim, dim, reduction)
        self.norm = nn.Identity() if reduction == 1 else nn.LayerNorm(dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(drop)

    def core_flops(self, height: int, width: int) -> int:
        """Multiply-accumulates of q k^T and of the weighted sum for one height x width map."""
        keys = ceil(height / self.reduction) * ceil(width / self.reduction)
        return 2 * height * width * keys * self.proj.in_features

    def forward(self, x: Tensor) -> Tensor:
        """B x H x W x C to the same."""
        return self._run_interior(self.q(x), self.kv(self.norm(self.reduce(x))))

    def _interior(self, q: Tensor, kv: Tensor) -> Tensor:
        batch, height, width, dim = q.shape
        query = q.view(batch, height * width, self.heads, -1).transpose(1, 2)
        k, v = kv.view(batch, -1, 2, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        out = ops.biased_attention(query, k, v, None)
        projected: Tensor = self.drop(self.proj(out.transpose(1, 2).reshape(batch, height, width, dim)))
        return projected
