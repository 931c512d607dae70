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
from dattrain.ops import transforms

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


def window_start(query: Tensor, size: int, kernel_size: int) -> Tensor:
    """First key of the window of each ``query`` (int64) along an axis of ``size``: centred, clamped so that it lies inside."""
    return (query - kernel_size // 2).clamp(0, size - _at_most(size, kernel_size))


def _at_most(size: Any, limit: int) -> int:
    """The smaller one. Under ``torch.jit.trace`` sizes are tensors, of which Python's ``min`` would take one for good."""
    return size.clamp(max=limit) if isinstance(size, Tensor) else min(size, limit)  # type: ignore[return-value]


_kept: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}
"""Of ``_tiles``, by its arguments: kilobytes each, and never let go, since a CUDA graph may read them."""


def _tiles(size: int, kernel_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """How an axis is cut into tiles of ``kernel_size`` queries: keys of each tile (tiles x reach), and the table's index of
    each query and key (tiles x kernel_size x reach), both int64.

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


def _gather(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, size: int) -> Tensor:
    batch, heads, height, width, dim = q.shape

    def axis(length: int) -> tuple[Tensor, Tensor]:
        query = torch.arange(length, device=q.device)[:, None]
        keys = window_start(query, length, size) + torch.arange(_at_most(length, size), device=q.device)
        return keys, keys - query + size - 1

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
