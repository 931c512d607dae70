"""Sampling, depthwise convolution and window attention of the ``native`` backend, on contiguous maps, channels last."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dattrain.ops.cpp import build

SUFFIXES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}
KERNELS = (1, 3, 5, 7, 9)


def sample(x: Tensor, positions: Tensor) -> Tensor:
    """``dattrain.ops.sample``."""
    batch, _, _, channels = x.shape
    out = x.new_empty(batch, positions.shape[2], channels)
    _sample(x, positions, out, None, None, None)
    return out


def sample_backward(grad: Tensor, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and positions."""
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_positions = torch.empty_like(positions, memory_format=torch.contiguous_format)
    _sample(x, positions, None, grad, grad_x, grad_positions)
    return grad_x, grad_positions


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """``dattrain.ops.depthwise_conv``; weight and bias in the computing dtype."""
    batch, height, width, channels = x.shape
    out = x.new_empty(batch, -(-height // stride), -(-width // stride), channels)
    _depthwise(x, weight, bias, out, None, None, None, None, stride=stride)
    return out


def depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    groups = x.shape[3] // weight.shape[0]
    threads = max(1, min(torch.get_num_threads(), x.shape[0] * groups))
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_weight = weight.new_zeros(threads, *weight.shape)
    grad_bias = bias.new_zeros(threads, *bias.shape)
    _depthwise(x, weight, bias, None, grad, grad_x, grad_weight, grad_bias, stride=stride)
    return grad_x, grad_weight.sum(0), grad_bias.sum(0)


def windows(qkv: Tensor, bias: Tensor, mask: Tensor | None, heads: int) -> tuple[Tensor, Tensor]:
    """``dattrain.ops.window_attention`` and the log-sum-exp of the logits, B x windows x heads x area."""
    batch, count, area, channels = qkv.shape
    out = qkv.new_empty(batch, count, area, channels // 3)
    lse = bias.new_empty(batch, count, heads, area)
    _windows(qkv, bias, mask, out, lse, None, None, None, heads=heads)
    return out, lse


def windows_backward(
    grad: Tensor, qkv: Tensor, bias: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv and bias."""
    threads = max(1, min(torch.get_num_threads(), qkv.shape[0] * qkv.shape[1] * heads))
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    grad_bias = bias.new_zeros(threads, *bias.shape)
    _windows(qkv, bias, mask, out, lse, grad, grad_qkv, grad_bias, heads=heads)
    return grad_qkv, grad_bias.sum(0)


def _windows(qkv: Tensor, *others: Tensor | None, heads: int) -> None:
    """``others``: bias, mask, out, lse, grad, grad_qkv, grad_bias; the last three None in forward."""
    batch, windows, area, channels = qkv.shape
    dim = channels // 3 // heads
    _run("windows", qkv, others, [batch * windows, windows, heads, area, dim], dim**-0.5)


def _sample(x: Tensor, positions: Tensor, *others: Tensor | None) -> None:
    """``others``: out, None in backward; grad, grad_x, grad_positions, None in forward."""
    sizes = [x.shape[0], positions.shape[1], *x.shape[1:], positions.shape[2]]
    _run("sample", x, (positions, *others), sizes)


def _depthwise(x: Tensor, weight: Tensor, *others: Tensor | None, stride: int) -> None:
    """``others``: bias; out, None in backward; grad, grad_x, grad_weight, grad_bias, None in forward."""
    sizes = [x.shape[0], x.shape[3] // weight.shape[0], *x.shape[1:], stride, weight.shape[-1]]
    _run("depthwise", x, (weight, *others), sizes)


def _run(
    name: str, first: Tensor, others: tuple[Tensor | None, ...], sizes: list[int], *numbers: float
) -> None:
    if not sizes[0]:
        return
    # Kept until the call is over: a contiguous copy has no other owner.
    kept = [None if x is None else x.contiguous() for x in (first, *others)]
    failed = getattr(build.library(), f"dattrain_{name}_{SUFFIXES[first.dtype]}")(
        (ctypes.c_void_p * len(kept))(*(None if x is None else x.data_ptr() for x in kept)),
        (ctypes.c_int64 * len(sizes))(*sizes),
        *numbers,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"the native {name} could not allocate its work space")
