"""Bilinear sampling of feature maps at key positions.

Backends: ``native`` on CPUs, ``triton`` on NVIDIA; elsewhere plain torch. ``F.grid_sample`` is never asked on CUDA: it goes
to cuDNN, whose gradient of the map is made by atomic adds and, unlike torch's own, does not say so under
``torch.use_deterministic_algorithms``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dattrain.ops import dispatch, transforms
from dattrain.ops.cpp import bindings, build


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
        ValueError: if the shapes do not fit, or devices differ.
    """
    if (
        x.dim() != 4
        or positions.dim() != 4
        or positions.shape[-1] != 2
        or positions.shape[0] != x.shape[0]
        or 0 in (*x.shape[1:], *positions.shape[1:3])
        or x.shape[3] % positions.shape[1]
        or not x.is_floating_point()
    ):
        raise ValueError(
            "sample needs x B x H x W x (groups * c) in a float dtype and positions B x groups x Ns x 2, none of them empty but for B, "
            f"not {tuple(x.shape)} in {x.dtype} and {tuple(positions.shape)}"
        )
    dispatch.check_devices(x, positions)
    computes = positions.dtype == torch.promote_types(x.dtype, torch.float32)
    chosen = dispatch.resolve(x, None)
    # Under torch.compile the question cannot be traced (it runs a compiler); the operator meets the answer.
    if computes and (
        (chosen == "native" and x.dtype in bindings.SUFFIXES)
        or (chosen == "triton" and (torch.compiler.is_compiling() or dispatch.compiles(x.device)))
    ):
        out: Tensor = _sample(x, positions, chosen)
        return out
    # grid_sample has no forward mode.
    return gather(x, positions) if x.is_cuda or transforms.under_way() else _grid_sample(x, positions)


def _folded(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (B * groups) x c x H x W and grid (B * groups) x 1 x Ns x 2 in order x, y, as ``grid_sample`` takes them."""
    batch, height, width, channels = x.shape
    groups = positions.shape[1]
    maps = x.reshape(batch, height, width, groups, channels // groups).permute(0, 3, 4, 1, 2).flatten(0, 1)
    return maps.to(positions.dtype), positions.flatten(0, 1).flip(-1).unsqueeze(1)


def _grid_sample(x: Tensor, positions: Tensor) -> Tensor:
    # Autocast never narrows grid_sample's fp32 inputs, and has no switch on the meta device.
    out = F.grid_sample(*_folded(x, positions), mode="bilinear", align_corners=True)
    return out.to(x.dtype).reshape(x.shape[0], x.shape[3], positions.shape[2]).transpose(1, 2)


def _grid_sample_backward(grad: Tensor, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and positions, by name: inside an operator autograd records nothing."""
    batch, height, width, channels = x.shape
    groups, points = positions.shape[1:3]
    maps, grid = _folded(x, positions)
    cotangent = (
        grad.to(positions.dtype).transpose(1, 2).reshape(batch * groups, channels // groups, 1, points)
    )
    bilinear, zeros = 0, 0
    grad_maps, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
        cotangent, maps, grid, bilinear, zeros, True, (True, True)
    )
    grad_x = grad_maps.view(batch, channels, height, width).permute(0, 2, 3, 1).to(x.dtype)
    return grad_x.contiguous(), grad_grid.view(positions.shape).flip(-1)


def gather(x: Tensor, positions: Tensor) -> Tensor:
    """``sample`` by four rows of pixels per point, weighed: it has every kind of derivative, and torch adds its gradient up in a fixed order when told to."""
    batch, height, width, channels = x.shape
    groups, points = positions.shape[1:3]
    y = (positions[..., 0] + 1) * ((height - 1) / 2)
    column = (positions[..., 1] + 1) * ((width - 1) / 2)
    top, left = y.floor(), column.floor()
    fy, fx = y - top, column - left
    rows = x.to(positions.dtype).reshape(-1, channels // groups)
    image = torch.arange(batch, device=x.device).view(-1, 1, 1) * (height * width)
    group = torch.arange(groups, device=x.device).view(1, -1, 1)
    out = torch.zeros((), dtype=positions.dtype, device=x.device)
    for dy, by_y in enumerate((1 - fy, fy)):
        for dx, by_x in enumerate((1 - fx, fx)):
            at_y, at_x = top + dy, left + dx
            outside = (at_y < 0) | (at_y > height - 1) | (at_x < 0) | (at_x > width - 1)
            # A coordinate that is no number is neither outside nor inside: it reads the first pixel, with no number.
            inside = (at_y >= 0) & (at_y <= height - 1) & (at_x >= 0) & (at_x <= width - 1)
            pixel = at_y.where(inside, 0).long() * width + at_x.where(inside, 0).long()
            taps = rows.index_select(0, ((image + pixel) * groups + group).flatten())
            weight = (by_y * by_x).masked_fill(outside, 0).unsqueeze(-1)
            out = out + weight * taps.view(batch, groups, points, channels // groups)
    return out.to(x.dtype).transpose(1, 2).reshape(batch, points, channels)


@torch.library.custom_op("dattrain::sample", mutates_args=())
def _sample(x: Tensor, positions: Tensor, backend: str) -> Tensor:
    if backend == "native":
        return (bindings.sample if build.status()[0] else _grid_sample)(x, positions).contiguous()
    if not dispatch.compiles(x.device):
        return gather(x, positions)
    from dattrain.ops import triton_sampling

    return triton_sampling.sample(x, positions)


@_sample.register_fake
def _(x: Tensor, positions: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], positions.shape[2], x.shape[3])


@torch.library.custom_op("dattrain::sample_backward", mutates_args=())
def _sample_backward(grad: Tensor, x: Tensor, positions: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "native" and build.status()[0]:
        return bindings.sample_backward(grad, x, positions)
    if backend == "triton" and dispatch.compiles(x.device):
        from dattrain.ops import triton_sampling

        return triton_sampling.sample_backward(grad, x, positions)
    return _grid_sample_backward(grad, x, positions)


@_sample_backward.register_fake
def _(grad: Tensor, x: Tensor, positions: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), positions.new_empty(positions.shape)


transforms.register_autograd(
    _sample, _sample_backward, lambda x, positions, _: gather(x, positions), tensors=2
)
