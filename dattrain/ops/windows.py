"""Attention within windows, with a bias per pair of tokens and a mask per window."""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dattrain.ops import native, native_maps
from dattrain.ops.dispatch import resolve


def window_attention(qkv: Tensor, bias: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias + mask) v within each window; logits and softmax in fp32 or better.

    Args:
        qkv: B x windows x area x 3C, what one projection gives: q, k, v, each with its heads side by side.
        bias: heads x area x area, query before key, any float dtype.
        mask: windows x area x area, symmetric, added to the logits; without gradient. None for none.
        heads: attention heads.

    Returns:
        B x windows x area x C, in the dtype of ``qkv``.
    """
    if qkv.dtype in native_maps.SUFFIXES and resolve(qkv, None) == "native":
        wide = torch.promote_types(qkv.dtype, torch.float32)
        return _windows(qkv, bias.to(wide), None if mask is None else mask.to(wide), heads)[0]
    return _plain(qkv, bias, mask, heads)


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, logits and softmax in fp32 or better.

    ``scaled_dot_product_attention``, but for a bias that needs gradients on the CPU: there it has no fused kernel, and its
    fallback scales q and k apart and searches for empty rows (3-7% of a window block's time).

    Args:
        q, k, v: B x heads x length x d.
        bias: broadcastable to B x heads x length x length, any float dtype.
    """
    if q.device.type == "cpu" and bias.requires_grad and torch.is_grad_enabled():
        wide = torch.promote_types(bias.dtype, torch.float32)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias.to(wide)
        return logits.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))


def _plain(qkv: Tensor, bias: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    batch, windows, area, channels = qkv.shape
    q, k, v = qkv.view(batch, windows, area, 3, heads, channels // 3 // heads).permute(3, 0, 1, 4, 2, 5)
    if mask is None:
        q, k, v = (each.flatten(0, 1) for each in (q, k, v))
        bias = bias.unsqueeze(0)
    else:
        # Windows join the heads, so that their masks broadcast over the batch and are never written per sample.
        q, k, v = (each.flatten(1, 2) for each in (q, k, v))
        bias = (bias + mask.unsqueeze(1).to(bias.dtype)).flatten(0, 1).unsqueeze(0)
    out = biased_attention(q, k, v, bias)
    return out.reshape(batch, windows, heads, area, channels // 3 // heads).transpose(2, 3).flatten(3)


# The log-sum-exp is a second result because the library's backward needs it; without the library nobody fills or reads it.
@torch.library.custom_op("dattrain::window_attention", mutates_args=())
def _windows(qkv: Tensor, bias: Tensor, mask: Optional[Tensor], heads: int) -> tuple[Tensor, Tensor]:  # noqa: UP045
    if native.status()[0]:
        return native_maps.windows(qkv, bias, mask, heads)
    with torch.autocast("cpu", enabled=False):
        out = _plain(qkv, bias, mask, heads).contiguous()
    return out, bias.new_empty(*qkv.shape[:2], heads, qkv.shape[2])


@_windows.register_fake
def _(qkv: Tensor, bias: Tensor, mask: Tensor | None, heads: int) -> tuple[Tensor, Tensor]:
    batch, windows, area, channels = qkv.shape
    return qkv.new_empty(batch, windows, area, channels // 3), bias.new_empty(batch, windows, heads, area)


@torch.library.custom_op("dattrain::window_attention_backward", mutates_args=())
def _windows_backward(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor,
    mask: Optional[Tensor],  # noqa: UP045
    out: Tensor,
    lse: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor]:
    if native.status()[0]:
        return native_maps.windows_backward(grad, qkv, bias, mask, out, lse, heads)
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        qkv, bias = qkv.detach().requires_grad_(), bias.detach().requires_grad_()
        grads = torch.autograd.grad(_plain(qkv, bias, mask, heads), (qkv, bias), grad)
    return grads[0].contiguous(), grads[1].contiguous()


@_windows_backward.register_fake
def _(
    grad: Tensor, qkv: Tensor, bias: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, bias, mask, ctx.heads = inputs
    ctx.save_for_backward(qkv, bias, mask, *output)


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_windows_backward(grad, *ctx.saved_tensors, ctx.heads), None, None)


_windows.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.dattrain.window_attention)
def _flops(qkv: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two products of queries and keys, as torch counts scaled_dot_product_attention."""
    batch, windows, area, channels = qkv
    return 4 * batch * windows * area * area * (channels // 3)


@register_flop_formula(torch.ops.dattrain.window_attention_backward)
def _flops_backward(grad: Any, qkv: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Five products, one of them recomputed."""
    return 5 * _flops(qkv) // 2
