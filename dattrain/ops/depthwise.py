"""Depthwise convolution of B x H x W x C maps whose kernels the groups of channels share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dattrain.ops import transforms
from dattrain.ops.cpp import bindings, build
from dattrain.ops.dispatch import check_devices, resolve


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    """Depthwise k x k convolution with zero padding k // 2, in fp32 or better on CPUs.

    Args:
        x: B x H x W x (groups * c).
        weight: c x 1 x k x k, k odd; used for each of the groups.
        bias: c.
        stride: of both axes.

    Returns:
        B x ceil(H / stride) x ceil(W / stride) x (groups * c), in the dtype of ``x``.

    Raises:
        ValueError: if the shapes do not fit, or devices differ.
    """
    if (
        x.dim() != 4
        or weight.dim() != 4
        or weight.shape[0] < 1
        or weight.shape[1] != 1
        or x.shape[3] < 1
        or x.shape[3] % weight.shape[0]
        or not (weight.shape[2] % 2 and weight.shape[3] % 2)
        or tuple(bias.shape) != (weight.shape[0],)
        or stride < 1
    ):
        raise ValueError(
            "depthwise_conv needs x B x H x W x (groups * c), weight c x 1 x k x k, k odd, bias c and a stride of at least 1, "
            f"not {tuple(x.shape)}, {tuple(weight.shape)}, {tuple(bias.shape)} and {stride}"
        )
    check_devices(x, weight, bias)
    if (
        x.dtype in bindings.SUFFIXES
        and weight.shape[-1] in bindings.KERNELS
        and weight.shape[-2] == weight.shape[-1]
        and resolve(x, None) == "native"
    ):
        wide = torch.promote_types(x.dtype, torch.float32)
        out: Tensor = _depthwise(x, weight.to(wide), bias.to(wide), stride)
        return out
    return _conv2d(x, weight, bias, stride)


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        # CPUs have no depthwise kernel in bf16: forward and backward take twice the time of fp32.
        with torch.autocast("cpu", enabled=False):
            return _conv2d(x.float(), weight.float(), bias.float(), stride).to(x.dtype)
    groups = x.shape[3] // weight.shape[0]
    if groups > 1:
        # The kernels are repeated, not the map folded into the batch: the map stays where it is.
        weight, bias = weight.repeat(groups, 1, 1, 1), bias.repeat(groups)
    padding = weight.shape[-2] // 2, weight.shape[-1] // 2
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, padding, groups=x.shape[3])
    return out.permute(0, 2, 3, 1)


def _conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, by name: inside an operator autograd records nothing."""
    wide = weight.dtype
    groups, padding = x.shape[3] // weight.shape[0], [weight.shape[-2] // 2, weight.shape[-1] // 2]
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad.to(wide).permute(0, 3, 1, 2),
        x.to(wide).permute(0, 3, 1, 2),
        weight.repeat(groups, 1, 1, 1),
        [x.shape[3]],
        [stride, stride],
        padding,
        [1, 1],
        False,
        [0, 0],
        x.shape[3],
        [True, True, True],
    )
    per_group = (groups, *weight.shape)
    return (
        grad_x.permute(0, 2, 3, 1).to(x.dtype).contiguous(),
        grad_weight.view(per_group).sum(0),
        grad_bias.view(per_group[:2]).sum(0),
    )


# Where the library is not there, a graph that was made where it is (exported, or on the meta device) runs all the same.
@torch.library.custom_op("dattrain::depthwise_conv", mutates_args=())
def _depthwise(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    if build.status()[0]:
        return bindings.depthwise(x, weight, bias, stride)
    with torch.autocast("cpu", enabled=False):
        return _conv2d(x, weight, bias, stride).contiguous()


@_depthwise.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    batch, height, width, channels = x.shape
    return x.new_empty(batch, (height + stride - 1) // stride, (width + stride - 1) // stride, channels)


@torch.library.custom_op("dattrain::depthwise_conv_backward", mutates_args=())
def _depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    if build.status()[0]:
        return bindings.depthwise_backward(grad, x, weight, bias, stride)
    return _conv2d_backward(grad, x, weight, bias, stride)


@_depthwise_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


transforms.register_autograd(_depthwise, _depthwise_backward, _conv2d, tensors=3)


@register_flop_formula(torch.ops.dattrain.depthwise_conv)
def _flops(x: torch.Size, weight: torch.Size, _bias: torch.Size, stride: int, **_: Any) -> int:
    """A multiply-accumulate per output and tap."""
    batch, height, width, channels = x
    return 2 * batch * -(-height // stride) * -(-width // stride) * channels * weight[2] * weight[3]


@register_flop_formula(torch.ops.dattrain.depthwise_conv_backward)
def _flops_backward(_grad: torch.Size, *inputs: Any, **_: Any) -> int:
    """One for the map's gradient, one for the kernels'."""
    return 2 * _flops(*inputs)
