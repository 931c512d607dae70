"""Bilinear sampling of feature maps at key positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dattrain.ops import native, native_maps
from dattrain.ops.dispatch import resolve


def sample(x: Tensor, positions: Tensor) -> Tensor:
    """Read maps bilinearly at the positions of each group (corners aligned, zeros outside), in fp32 or better.

    Interpolation weights carry the gradient of the offsets, so they are never narrower than ``positions``: bf16 would
    misplace a key by up to .09 pixels on a 24 x 24 map.

    Args:
        x: B x H x W x C; channels of group g are the g-th of ``groups`` equal parts.
        positions: B x groups x Ns x 2 in order y, x, normalised to [-1, 1], fp32 (fp64 for fp64 ``x``).

    Returns:
        B x Ns x C, in the dtype of ``x``.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if (
        x.dim() != 4
        or positions.dim() != 4
        or positions.shape[-1] != 2
        or positions.shape[0] != x.shape[0]
        or x.shape[3] % positions.shape[1]
    ):
        raise ValueError(
            "sample needs x B x H x W x (groups * c) and positions B x groups x Ns x 2, "
            f"not {tuple(x.shape)} and {tuple(positions.shape)}"
        )
    computes = positions.dtype == torch.promote_types(x.dtype, torch.float32)
    if computes and x.dtype in native_maps.SUFFIXES and resolve(x, None) == "native":
        return _sample(x, positions)
    return _grid_sample(x, positions)


def _grid_sample(x: Tensor, positions: Tensor) -> Tensor:
    batch, height, width, channels = x.shape
    groups, points = positions.shape[1:3]
    maps = x.reshape(batch, height, width, groups, channels // groups).permute(0, 3, 4, 1, 2).flatten(0, 1)
    # Autocast never narrows grid_sample's fp32 inputs, and has no switch on the meta device.
    grid = positions.flatten(0, 1).flip(-1).unsqueeze(1)
    out = F.grid_sample(maps.to(positions.dtype), grid, mode="bilinear", align_corners=True)
    return out.to(x.dtype).reshape(batch, channels, points).transpose(1, 2)


@torch.library.custom_op("dattrain::sample", mutates_args=())
def _sample(x: Tensor, positions: Tensor) -> Tensor:
    if native.status()[0]:
        return native_maps.sample(x, positions)
    return _grid_sample(x, positions).contiguous()


@_sample.register_fake
def _(x: Tensor, positions: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], positions.shape[2], x.shape[3])


@torch.library.custom_op("dattrain::sample_backward", mutates_args=())
def _sample_backward(grad: Tensor, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    if native.status()[0]:
        return native_maps.sample_backward(grad, x, positions)
    with torch.enable_grad():
        inputs = x.detach().requires_grad_(), positions.detach().requires_grad_()
        grads = torch.autograd.grad(_grid_sample(*inputs), inputs, grad)
    return grads[0].contiguous(), grads[1].contiguous()


@_sample_backward.register_fake
def _(grad: Tensor, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), positions.new_empty(positions.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _sample_backward(grad, *ctx.saved_tensors)


_sample.register_autograd(_backward, setup_context=_setup_context)
