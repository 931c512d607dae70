"""Attention within windows, with a bias per pair of tokens and a mask per window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dattrain.ops import transforms
from dattrain.ops.cpp import bindings, build
from dattrain.ops.dispatch import check_devices, resolve


def window_attention(qkv: Tensor, bias: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias + mask) v within each window; logits and softmax in fp32 or better.

    Args:
        qkv: B x windows x area x 3C, what one projection gives: q, k, v, each with its heads side by side.
        bias: heads x area x area, query before key, any float dtype.
        mask: windows x area x area, symmetric, added to the logits; without gradient. None for none.
        heads: attention heads.

    Returns:
        B x windows x area x C, in the dtype of ``qkv``.

    Raises:
        ValueError: if the shapes do not fit, or devices differ.
    """
    pairs = (heads, *qkv.shape[2:3] * 2)
    if (
        qkv.dim() != 4
        or heads < 1
        or qkv.shape[3] < 1
        or qkv.shape[3] % (3 * heads)
        or tuple(bias.shape) != pairs
        or (mask is not None and tuple(mask.shape) != (qkv.shape[1], *pairs[1:]))
    ):
        raise ValueError(
            "window_attention needs qkv B x windows x area x (3 * heads * d), bias heads x area x area and mask windows x area x area, "
            f"not {tuple(qkv.shape)}, {tuple(bias.shape)} and {None if mask is None else tuple(mask.shape)} with {heads} heads"
        )
    check_devices(qkv, bias, mask)
    if qkv.dtype in bindings.SUFFIXES and resolve(qkv, None) == "native":
        wide = torch.promote_types(qkv.dtype, torch.float32)
        out: Tensor = _windows(qkv, bias.to(wide), None if mask is None else mask.to(wide), heads)[0]
        return out
    return _plain(qkv, bias, mask, heads)


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, logits and softmax in fp32 or better.

    ``scaled_dot_product_attention``, but for the ``reference`` backend, and for a bias on the CPU where gradients are
    needed: there it has no fused kernel, and its fallback scales q and k apart and searches for empty rows (3-7% of a
    window block's time).

    Args:
        q, k, v: B x heads x length x d; k and v may have another length.
        bias: broadcastable to B x heads x queries x keys, any float dtype; None for none.

    Raises:
        ValueError: if the shapes do not fit, or devices differ.
    """
    if q.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3:] != k.shape[3:]:
        raise ValueError(
            f"biased_attention needs q, k, v B x heads x length x d, k and v alike, not {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    pairs = (*q.shape[:3], k.shape[2])
    if bias is not None and (
        bias.dim() > 4 or any(n not in (1, m) for n, m in zip(bias.shape[::-1], pairs[::-1]))
    ):
        raise ValueError(f"the bias of biased_attention must broadcast to {pairs}, not {tuple(bias.shape)}")
    check_devices(q, k, v, bias)
    slow = bias is not None and q.device.type == "cpu" and torch.is_grad_enabled()
    if slow and any(x is not None and x.requires_grad for x in (q, k, v, bias)):
        return _equations(q, k, v, bias)
    if resolve(q, None) == "reference":
        return _equations(q, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))


def _equations(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        logits = logits + bias
    out: Tensor = logits.softmax(-1).to(v.dtype) @ v
    return out


def _plain(
    qkv: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    heads: int,
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = biased_attention,
) -> Tensor:
    batch, windows, area, channels = qkv.shape
    q, k, v = qkv.view(batch, windows, area, 3, heads, channels // 3 // heads).permute(3, 0, 1, 4, 2, 5)
    if mask is None:
        q, k, v = (each.flatten(0, 1) for each in (q, k, v))
        bias = bias.unsqueeze(0)
    else:
        # Windows join the heads, so that their masks broadcast over the batch and are never written per sample.
        q, k, v = (each.flatten(1, 2) for each in (q, k, v))
        bias = (bias + mask.unsqueeze(1).to(bias.dtype)).flatten(0, 1).unsqueeze(0)
    out = attend(q, k, v, bias)
    return out.reshape(batch, windows, heads, area, channels // 3 // heads).transpose(2, 3).flatten(3)


def _plain_backward(
    grad: Tensor, qkv: Tensor, bias: Tensor, mask: Tensor | None, heads: int
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv and bias, by formula: inside an operator autograd records nothing."""
    batch, windows, area, channels = qkv.shape
    dim = channels // 3 // heads
    wide, scale = bias.dtype, dim**-0.5
    q, k, v = qkv.to(wide).view(batch, windows, area, 3, heads, dim).permute(3, 0, 1, 4, 2, 5)
    grad = grad.to(wide).reshape(batch, windows, area, heads, dim).transpose(2, 3)
    added = bias if mask is None else bias + mask.unsqueeze(1)
    weights = ((q * scale) @ k.transpose(-2, -1) + added).softmax(-1)
    grad_weights = grad @ v.transpose(-2, -1)
    grad_logits = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    grad_qkv = torch.stack(
        (
            grad_logits @ k * scale,
            grad_logits.transpose(-2, -1) @ q * scale,
            weights.transpose(-2, -1) @ grad,
        )
    )
    return grad_qkv.permute(1, 2, 4, 0, 3, 5).reshape(qkv.shape).to(qkv.dtype), grad_logits.sum((0, 1))


# Where the library is not there, a graph that was made where it is (exported, or on the meta device) runs all the same.
# The log-sum-exp is a second result because the library's backward needs it; without the library nobody fills or reads it.
@torch.library.custom_op("dattrain::window_attention", mutates_args=())
def _windows(qkv: Tensor, bias: Tensor, mask: Optional[Tensor], heads: int) -> tuple[Tensor, Tensor]:  # noqa: UP045
    if build.status()[0]:
        return bindings.windows(qkv, bias, mask, heads)
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
    if build.status()[0]:
        return bindings.windows_backward(grad, qkv, bias, mask, out, lse, heads)
    with torch.autocast("cpu", enabled=False):
        return _plain_backward(grad, qkv, bias, mask, heads)


@_windows_backward.register_fake
def _(
    grad: Tensor, qkv: Tensor, bias: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape)


transforms.register_autograd(
    _windows,
    _windows_backward,
    lambda qkv, bias, mask, heads: _plain(qkv, bias, mask, heads, _equations),
    tensors=3,
)


@register_flop_formula(torch.ops.dattrain.window_attention)
def _flops(qkv: torch.Size, *_: Any, **__: Any) -> int:
    """Two products of queries and keys, as torch counts scaled_dot_product_attention."""
    batch, windows, area, channels = qkv
    return 4 * batch * windows * area * area * (channels // 3)


@register_flop_formula(torch.ops.dattrain.window_attention_backward)
def _flops_backward(grad: torch.Size, qkv: torch.Size, *_: Any, **__: Any) -> int:
    """Five products, one of them recomputed."""
    return 5 * _flops(qkv) // 2
