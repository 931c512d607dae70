"""Neighbourhood attention: each query attends to the k x k window that is centred on it, shifted inside at borders.

Source: Hassani et al., Neighborhood Attention Transformer (arXiv 2204.07143), equations 2-3 and section 3.4, with the
relative position bias that NATTEN gave its 0.14 module, which DAT++ (arXiv 2309.01430) uses. NATTEN has dropped that bias
since 0.20, so this is torch alone: a k x k tile of queries shares its keys, and all work is matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dattrain.ops import transforms


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor | None,
    *,
    kernel_size: int,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T + bias) v over each query's window.

    Args:
        q, k, v: B x heads x H x W x d, any float dtype.
        bias_table: heads x (2 kernel_size - 1) x (2 kernel_size - 1), read at ``key - query + kernel_size - 1`` per axis,
            so that the bias follows the true displacement where the window was shifted; or None.
        kernel_size: odd. An axis shorter than it is attended whole (NATTEN's module pads it with zeros instead).
        scale: d ** -0.5 when None.

    Returns:
        B x heads x H x W x d, dtype of ``q``. Logits and softmax are float32 (float64 for float64).

    Raises:
        ValueError: the kernel size is even, or the table does not fit it.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"neighbourhood attention needs an odd kernel size, not {kernel_size}")
    side = 2 * kernel_size - 1
    if bias_table is not None and tuple(bias_table.shape) != (q.shape[1], side, side):
        raise ValueError(f"bias table is {tuple(bias_table.shape)}, not {(q.shape[1], side, side)}")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    # Scaled before the product, as NATTEN does: in float16 the unscaled product can pass 65504.
    return _tiled(q * scale, k, v, bias_table, kernel_size)


def window_start(query: Tensor, size: int, kernel_size: int) -> Tensor:
    """First key of the window of each ``query`` (int64) along an axis of ``size``: centred, clamped so that it lies inside."""
    return (query - kernel_size // 2).clamp(0, size - _at_most(size, kernel_size))


def _at_most(size: Any, limit: int) -> int:
    """The smaller one. Under ``torch.jit.trace`` sizes are tensors, of which Python's ``min`` would take one for good."""
    return size.clamp(max=limit) if isinstance(size, Tensor) else min(size, limit)  # type: ignore[return-value]


_kept: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}
"""Results of ``_tiles`` by its arguments: kilobytes each, and never let go, since a CUDA graph may read them."""


def _tiles(size: int, kernel_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """How an axis is cut into tiles of ``kernel_size`` queries.

    Keys of each tile (tiles x reach), and the table's index of each query and key (tiles x kernel_size x reach), both int64.

    A tile reads reach = min(2 kernel_size - 1, size) consecutive keys, which hold the windows of all its queries; the index
    is -1 where a key is outside the query's window. Queries past the end of the axis repeat the last one.

    Kept from call to call, but not where they are no ordinary tensors (``transforms.ordinary``): whoever traces must see how
    they are made; nor while a CUDA graph is recorded, whose memory they would lie in.
    """
    if not transforms.ordinary():
        return _tiles_on(device, size, kernel_size)
    key = (size, kernel_size, device)
    if key not in _kept:
        with torch.inference_mode(False):  # or no later training could save them for backward
            made = _tiles_on(device, size, kernel_size)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return made
        _kept[key] = made
    return _kept[key]


def _tiles_on(device: torch.device, size: int, kernel_size: int) -> tuple[Tensor, Tensor]:
    # By arithmetic on the device: a copy from the host would wait, and be a constant on the CPU to a compiler.
    width, reach = _at_most(size, kernel_size), _at_most(size, 2 * kernel_size - 1)
    first = torch.arange(0, size, kernel_size, device=device)
    keys = (first - kernel_size // 2).clamp(0, size - reach)[:, None] + torch.arange(reach, device=device)
    query = (first[:, None] + torch.arange(kernel_size, device=device)).clamp(max=size - 1)[:, :, None]
    place = keys[:, None] - window_start(query, size, kernel_size)
    inside = (place >= 0) & (place < width)
    return keys, torch.where(inside, keys[:, None] - query + kernel_size - 1, -1)


def _tiled(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, size: int) -> Tensor:
    batch, heads, height, width, dim = q.shape
    keys_y, at_y = _tiles(height, size, q.device)
    keys_x, at_x = _tiles(width, size, q.device)
    (rows, reach_y), (cols, reach_x) = keys_y.shape, keys_x.shape

    pad_y, pad_x = rows * size - height, cols * size - width
    tiles = torch.nn.functional.pad(q, (0, 0, 0, pad_x, 0, pad_y))
    tiles = tiles.reshape(batch, heads, rows, size, cols, size, dim).permute(0, 1, 2, 4, 3, 5, 6)
    tiles = tiles.reshape(batch, heads, rows * cols, size * size, dim)

    def windows(x: Tensor) -> Tensor:
        x = x.index_select(2, keys_y.flatten()).index_select(3, keys_x.flatten())
        x = x.reshape(batch, heads, rows, reach_y, cols, reach_x, dim).permute(0, 1, 2, 4, 3, 5, 6)
        return x.reshape(batch, heads, rows * cols, reach_y * reach_x, dim)

    logits = _wide(tiles @ windows(k).transpose(-1, -2))
    at_y, at_x = at_y[:, None, :, None, :, None], at_x[None, :, None, :, None, :]
    outside = ((at_y < 0) | (at_x < 0)).reshape(rows * cols, size * size, reach_y * reach_x)
    if table is not None:
        flat = (at_y.clamp(min=0) * table.shape[-1] + at_x.clamp(min=0)).reshape(-1)
        bias = table.flatten(1).to(logits.dtype).index_select(1, flat)
        logits = logits + bias.reshape(heads, rows * cols, size * size, reach_y * reach_x)
    weights = logits.masked_fill(outside, -torch.inf).softmax(-1).to(v.dtype)
    out = (
        (weights @ windows(v)).reshape(batch, heads, rows, cols, size, size, dim).permute(0, 1, 2, 4, 3, 5, 6)
    )
    return out.reshape(batch, heads, rows * size, cols * size, dim)[:, :, :height, :width]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
