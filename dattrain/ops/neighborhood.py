"""Neighbourhood attention: each query attends to the k x k window that is centred on it, shifted inside at borders.

Source: Hassani et al., Neighborhood Attention Transformer (arXiv 2204.07143), equations 2-3 and section 3.4, with the
relative position bias that NATTEN gave its 0.14 module, which DAT++ (arXiv 2309.01430) uses. NATTEN has dropped that bias
since 0.20, so what is here needs torch alone; an older NATTEN is used when asked for, by argument or by the environment
variable ``DATTRAIN_NEIGHBORHOOD=natten``.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from dattrain.errors import UserError

Backend = Literal["tiled", "gather", "natten"]
ENVIRONMENT_VARIABLE = "DATTRAIN_NEIGHBORHOOD"


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor | None,
    *,
    kernel_size: int,
    scale: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """softmax(scale q k^T + bias) v over each query's window.

    Args:
        q, k, v: B x heads x H x W x d, any float dtype.
        bias_table: heads x (2 kernel_size - 1) x (2 kernel_size - 1), read at ``key - query + kernel_size - 1`` per axis,
            so that the bias follows the true displacement where the window was shifted; or None.
        kernel_size: odd. An axis shorter than it is attended whole (NATTEN's module pads it with zeros instead).
        scale: d ** -0.5 when None.
        backend: ``tiled`` (the default) shares the keys of a k x k tile of queries and works by matrix products;
            ``gather`` copies each query's own window (k * k times the memory of the keys); ``natten`` is NATTEN 0.17 to
            0.19, on maps that hold a window. Same values.

    Returns:
        B x heads x H x W x d, dtype of ``q``. Logits and softmax are float32 (float64 for float64).

    Raises:
        ValueError: the kernel size is even, or the table does not fit it.
        UserError: the backend is unknown, or NATTEN is not there, too new, or gives other values.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"neighbourhood attention needs an odd kernel size, not {kernel_size}")
    side = 2 * kernel_size - 1
    if bias_table is not None and tuple(bias_table.shape) != (q.shape[1], side, side):
        raise ValueError(f"bias table is {tuple(bias_table.shape)}, not {(q.shape[1], side, side)}")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    name = backend or os.environ.get(ENVIRONMENT_VARIABLE) or "tiled"
    run = {"tiled": _tiled, "gather": _gather, "natten": _natten}.get(name)
    if run is None:
        raise UserError(f"{ENVIRONMENT_VARIABLE}={name} is no backend; there are tiled, gather and natten")
    if name == "natten" and min(q.shape[2:4]) < kernel_size:
        run = _tiled
    # Scaled before the product, as NATTEN does: in float16 the unscaled product can pass 65504.
    return run(q * scale, k, v, bias_table, kernel_size)


def window_start(size: int, kernel_size: int) -> list[int]:
    """First key of each query's window along an axis of ``size``: centred, clamped so that it lies inside."""
    last = size - min(kernel_size, size)
    return [min(max(i - kernel_size // 2, 0), last) for i in range(size)]


@lru_cache(maxsize=64)
def _tiles(
    size: int, kernel_size: int
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[tuple[int, ...], ...], ...]]:
    """How an axis is cut into tiles of ``kernel_size`` queries: (keys of each tile, table index per query and key).

    A tile reads min(2 kernel_size - 1, size) consecutive keys, which hold the windows of all its queries; the index is
    -1 where a key is outside the query's window. Queries past the end of the axis repeat the last one.
    """
    starts, width = window_start(size, kernel_size), min(kernel_size, size)
    reach = min(2 * kernel_size - 1, size)
    keys, index = [], []
    for first in range(0, size, kernel_size):
        base = min(max(first - kernel_size // 2, 0), size - reach)
        keys.append(tuple(range(base, base + reach)))
        rows = []
        for query in (min(i, size - 1) for i in range(first, first + kernel_size)):
            inside = range(starts[query], starts[query] + width)
            rows.append(tuple(key - query + kernel_size - 1 if key in inside else -1 for key in keys[-1]))
        index.append(tuple(rows))
    return tuple(keys), tuple(index)


def _tiled(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, size: int) -> Tensor:
    batch, heads, height, width, dim = q.shape
    keys_y, index_y = _tiles(height, size)
    keys_x, index_x = _tiles(width, size)
    rows, cols, reach_y, reach_x = len(keys_y), len(keys_x), len(keys_y[0]), len(keys_x[0])

    pad_y, pad_x = rows * size - height, cols * size - width
    tiles = torch.nn.functional.pad(q, (0, 0, 0, pad_x, 0, pad_y))
    tiles = tiles.reshape(batch, heads, rows, size, cols, size, dim).permute(0, 1, 2, 4, 3, 5, 6)
    tiles = tiles.reshape(batch, heads, rows * cols, size * size, dim)

    select_y = torch.tensor(keys_y, device=q.device).flatten()
    select_x = torch.tensor(keys_x, device=q.device).flatten()

    def windows(x: Tensor) -> Tensor:
        x = x.index_select(2, select_y).index_select(3, select_x)
        x = x.reshape(batch, heads, rows, reach_y, cols, reach_x, dim).permute(0, 1, 2, 4, 3, 5, 6)
        return x.reshape(batch, heads, rows * cols, reach_y * reach_x, dim)

    logits = _wide(tiles @ windows(k).transpose(-1, -2))
    at_y = torch.tensor(index_y, device=q.device)[:, None, :, None, :, None]
    at_x = torch.tensor(index_x, device=q.device)[None, :, None, :, None, :]
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


def _gather(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, size: int) -> Tensor:
    batch, heads, height, width, dim = q.shape

    def axis(length: int) -> tuple[Tensor, Tensor]:
        start = torch.tensor(window_start(length, size), device=q.device)
        keys = start[:, None] + torch.arange(min(size, length), device=q.device)
        return keys, keys - torch.arange(length, device=q.device)[:, None] + size - 1

    (keys_y, at_y), (keys_x, at_x) = axis(height), axis(width)
    flat = (keys_y[:, None, :, None] * width + keys_x[None, :, None, :]).reshape(-1)

    def windows(x: Tensor) -> Tensor:
        return x.flatten(2, 3).index_select(2, flat).reshape(batch, heads, height, width, -1, dim)

    logits = _wide((windows(k) @ q[..., None]).squeeze(-1))
    if table is not None:
        bias = table.to(logits.dtype)[:, at_y[:, None, :, None], at_x[None, :, None, :]]
        logits = logits + bias.reshape(heads, height, width, -1)
    weights = logits.softmax(-1).to(v.dtype)
    return (weights[..., None, :] @ windows(v)).squeeze(-2)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _natten(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, size: int) -> Tensor:
    functional = _checked_natten(q.device.type)
    table = None if table is None else table.to(q.dtype)
    logits = functional.na2d_qk(q.contiguous(), k.contiguous(), kernel_size=size, dilation=1, rpb=table)
    weights = _wide(logits).softmax(-1).to(v.dtype)
    return functional.na2d_av(weights, v.contiguous(), kernel_size=size, dilation=1)


@lru_cache(maxsize=2)
def _checked_natten(device: str) -> Any:
    """``natten.functional``, once it has given the values of ``gather`` on a small map with every kind of border."""
    try:
        from natten import functional
    except ImportError:
        raise UserError("the natten backend needs NATTEN 0.17 to 0.19: pip install 'natten<0.20'") from None
    if not hasattr(functional, "na2d_qk") or not hasattr(functional, "na2d_av"):
        raise UserError(
            "this NATTEN has no relative position bias any more: pip install 'natten<0.20', or use tiled"
        )
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 7, 6, 8, generator=generator).to(device) for _ in range(3))
    table = torch.randn(2, 9, 9, generator=generator).to(device)
    expected = _gather(q, k, v, table, 5)
    logits = functional.na2d_qk(q, k, kernel_size=5, dilation=1, rpb=table)
    found = functional.na2d_av(logits.softmax(-1), v, kernel_size=5, dilation=1)
    if not torch.allclose(found, expected, atol=1e-4):
        raise UserError(
            "this NATTEN gives other values than the equations: use the tiled backend, and report its version"
        )
    return functional
