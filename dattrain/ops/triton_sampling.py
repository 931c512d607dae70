"""Sampling of the ``triton`` backend: maps stay B x H x W x C as they lie, numbers are fp32 whatever is stored.

Forward and the positions' gradient gather four pixels per point. The map's gradient is a product: a pixel and a point meet
with the weight hat(y - row) * hat(x - column), hat(d) = max(1 - |d|, 0), so a tile of pixels is weights @ gradients, over
the blocks of points in turn that come near its rows. That needs no atomic adds, no fp32 copy of the map and no second pass
to narrow it, and has one order of summation: runs are equal bit for bit, with or without
``torch.use_deterministic_algorithms``. Counted for DAT-T's third stage (14 x 14 pixels, 196 points, 384 channels) at batch
128, weights against every point would be 4 GFLOP, which tensor cores do in the time that the two maps take to be read and
written; atomic adds would be 39 million. For larger maps, blocks of points that are passed over keep it in proportion.

Tile sizes are chosen by reasoning, not measured. ``TRITON_INTERPRET=1`` runs these kernels on CPU tensors, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dattrain.ops.deformable_attention.layout import unit_stride

PIXELS = 64
POINTS = 32
"""Tile of the map's gradient: pixels of a program, points of a step."""


@triton.jit
def _pixel(positions, point, valid, height, width):
    """Where points lie on the map, in pixels along y and x; past the last point, outside the map."""
    y = (tl.load(positions + point * 2, mask=valid, other=0.0) + 1) * ((height - 1) * 0.5)
    x = (tl.load(positions + point * 2 + 1, mask=valid, other=0.0) + 1) * ((width - 1) * 0.5)
    return tl.where(valid, y, -2.0), tl.where(valid, x, -2.0)


@triton.jit
def _tap(x, row, column, height, width, x_h, x_w, channel, in_channels):
    """Pixels (zeros outside the map) points x channels in fp32, and which points lie outside.

    A coordinate that is no number is not outside, so that its weight is no number either, and reads the first pixel.
    """
    outside = (row < 0) | (row > height - 1) | (column < 0) | (column > width - 1)
    inside = (row >= 0) & (row <= height - 1) & (column >= 0) & (column <= width - 1)
    at_row = tl.where(inside, row, 0.0).to(tl.int32)
    at_column = tl.where(inside, column, 0.0).to(tl.int32)
    place = at_row * x_h + at_column * x_w
    mask = (~outside)[:, None] & in_channels[None, :]
    value = tl.load(x + place[:, None] + channel[None, :], mask=mask, other=0.0)
    return value.to(tl.float32), outside


@triton.jit
def _forward_kernel(
    x, positions, out, groups, height, width, points, channels, x_b, x_h, x_w,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Some points and some channels of one group of one image."""
    parts = tl.cdiv(channels, BLOCK_C)
    blocks = tl.cdiv(points, BLOCK_P)
    channel = tl.program_id(0) % parts * BLOCK_C + tl.arange(0, BLOCK_C)
    point = tl.program_id(0) // parts % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    both = tl.program_id(0) // parts // blocks
    image = (both // groups).to(tl.int64)
    group = both % groups
    in_points = point < points
    in_channels = channel < channels
    y, column = _pixel(positions + both.to(tl.int64) * points * 2, point, in_points, height, width)
    top = tl.floor(y)
    left = tl.floor(column)
    fy = y - top
    fx = column - left
    x += image * x_b + group * channels
    v00, o00 = _tap(x, top, left, height, width, x_h, x_w, channel, in_channels)
    v01, o01 = _tap(x, top, left + 1, height, width, x_h, x_w, channel, in_channels)
    v10, o10 = _tap(x, top + 1, left, height, width, x_h, x_w, channel, in_channels)
    v11, o11 = _tap(x, top + 1, left + 1, height, width, x_h, x_w, channel, in_channels)
    result = tl.where(o00, 0.0, (1 - fy) * (1 - fx))[:, None] * v00
    result += tl.where(o01, 0.0, (1 - fy) * fx)[:, None] * v01
    result += tl.where(o10, 0.0, fy * (1 - fx))[:, None] * v10
    result += tl.where(o11, 0.0, fy * fx)[:, None] * v11
    out += (image * points * groups + group) * channels
    place = point[:, None] * (groups * channels) + channel[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=in_points[:, None] & in_channels[None, :])


@triton.jit
def _position_gradient_kernel(
    grad, x, positions, grad_positions, groups, height, width, points, channels, g_b, g_n, x_b, x_h, x_w,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Some points of one group of one image, over its channels."""
    blocks = tl.cdiv(points, BLOCK_P)
    point = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    both = tl.program_id(0) // blocks
    image = (both // groups).to(tl.int64)
    group = both % groups
    in_points = point < points
    offset = both.to(tl.int64) * points * 2
    y, column = _pixel(positions + offset, point, in_points, height, width)
    top = tl.floor(y)
    left = tl.floor(column)
    fy = y - top
    fx = column - left
    x += image * x_b + group * channels
    grad += image * g_b + group * channels
    sum_y = tl.zeros([BLOCK_P], tl.float32)
    sum_x = tl.zeros([BLOCK_P], tl.float32)
    for first in range(0, channels, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        in_channels = channel < channels
        mask = in_points[:, None] & in_channels[None, :]
        g = tl.load(grad + point[:, None] * g_n + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        v00, o00 = _tap(x, top, left, height, width, x_h, x_w, channel, in_channels)
        v01, o01 = _tap(x, top, left + 1, height, width, x_h, x_w, channel, in_channels)
        v10, o10 = _tap(x, top + 1, left, height, width, x_h, x_w, channel, in_channels)
        v11, o11 = _tap(x, top + 1, left + 1, height, width, x_h, x_w, channel, in_channels)
        along_y = tl.where(o10, 0.0, 1 - fx)[:, None] * v10 - tl.where(o00, 0.0, 1 - fx)[:, None] * v00
        along_y += tl.where(o11, 0.0, fx)[:, None] * v11 - tl.where(o01, 0.0, fx)[:, None] * v01
        along_x = tl.where(o01, 0.0, 1 - fy)[:, None] * v01 - tl.where(o00, 0.0, 1 - fy)[:, None] * v00
        along_x += tl.where(o11, 0.0, fy)[:, None] * v11 - tl.where(o10, 0.0, fy)[:, None] * v10
        sum_y += tl.sum(g * along_y, 1)
        sum_x += tl.sum(g * along_x, 1)
    grad_positions += offset
    tl.store(grad_positions + point * 2, sum_y * ((height - 1) * 0.5), mask=in_points)
    tl.store(grad_positions + point * 2 + 1, sum_x * ((width - 1) * 0.5), mask=in_points)


@triton.jit
def _hat(distance):
    # Not a maximum: hardware's drops what is no number.
    distance = tl.abs(distance)
    return tl.where(distance >= 1, 0.0, 1 - distance)


@triton.jit
def _map_gradient_kernel(
    grad, positions, grad_x, groups, height, width, points, channels, g_b, g_n,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Some pixels and some channels of one group of one image, over its points in order."""
    parts = tl.cdiv(channels, BLOCK_C)
    tiles = tl.cdiv(height * width, BLOCK_M)
    channel = tl.program_id(0) % parts * BLOCK_C + tl.arange(0, BLOCK_C)
    first_pixel = tl.program_id(0) // parts % tiles * BLOCK_M
    both = tl.program_id(0) // parts // tiles
    image = (both // groups).to(tl.int64)
    group = both % groups
    in_channels = channel < channels
    pixel = first_pixel + tl.arange(0, BLOCK_M)
    row = (pixel // width).to(tl.float32)
    column = (pixel % width).to(tl.float32)
    # Points nearer than a pixel to the tile's rows have a part in it.
    above = first_pixel // width - 1
    below = (first_pixel + BLOCK_M - 1) // width + 1
    positions += both.to(tl.int64) * points * 2
    grad += image * g_b + group * channels
    result = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for first in range(0, points, BLOCK_P):
        point = first + tl.arange(0, BLOCK_P)
        in_points = point < points
        y, x = _pixel(positions, point, in_points, height, width)
        far = (y <= above) | (y >= below)
        if tl.min(far.to(tl.int32), 0) == 0:
            mask = in_points[:, None] & in_channels[None, :]
            g = tl.load(grad + point[:, None] * g_n + channel[None, :], mask=mask, other=0.0)
            weight = _hat(y[None, :] - row[:, None]) * _hat(x[None, :] - column[:, None])
            if NARROW:
                # A weight in two halves keeps more digits than the result has, at the speed of the narrow product.
                high = weight.to(g.dtype)
                low = (weight - high.to(tl.float32)).to(g.dtype)
                result = tl.dot(low, g, result)
                result = tl.dot(high, g, result)
            else:
                result = tl.dot(weight, g, result, input_precision="tf32x3")
    grad_x += (image * height * width * groups + group) * channels
    place = pixel[:, None] * (groups * channels) + channel[None, :]
    mask = (pixel < height * width)[:, None] & in_channels[None, :]
    tl.store(grad_x + place, result.to(grad_x.dtype.element_ty), mask=mask)


def sample(x: Tensor, positions: Tensor) -> Tensor:
    """``dattrain.ops.sample``: B x Ns x C, contiguous."""
    x, positions = unit_stride(x), positions.contiguous()
    batch, height, width, channels = x.shape
    groups, points = positions.shape[1:3]
    own = channels // groups
    out = x.new_empty(batch, points, channels)
    if out.numel():
        tile = _tile(own)
        programs = batch * groups * triton.cdiv(points, tile["BLOCK_P"]) * triton.cdiv(own, tile["BLOCK_C"])
        with torch.cuda.device_of(x):
            _forward_kernel[(programs,)](
                x, positions, out, groups, height, width, points, own, *x.stride()[:3], **tile
            )
    return out


def sample_backward(grad: Tensor, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and positions, contiguous."""
    grad, x, positions = unit_stride(grad), unit_stride(x), positions.contiguous()
    batch, height, width, channels = x.shape
    groups, points = positions.shape[1:3]
    own = channels // groups
    grad_x, grad_positions = x.new_empty(x.shape), positions.new_empty(positions.shape)
    if not grad_x.numel():
        return grad_x, grad_positions.zero_()
    sizes = (groups, height, width, points, own)
    tile = _tile(own)
    narrow = grad.dtype != torch.float32
    block = tile["BLOCK_C"] if narrow else min(tile["BLOCK_C"], 64)
    with torch.cuda.device_of(x):
        if points:
            _position_gradient_kernel[(batch * groups * triton.cdiv(points, tile["BLOCK_P"]),)](
                grad, x, positions, grad_positions, *sizes, *grad.stride()[:2], *x.stride()[:3], **tile
            )
        _map_gradient_kernel[(batch * groups * triton.cdiv(height * width, PIXELS) * triton.cdiv(own, block),)](
            grad, positions, grad_x, *sizes, *grad.stride()[:2], BLOCK_M=PIXELS, BLOCK_P=POINTS,
            BLOCK_C=block, NARROW=narrow, num_stages=1,
        )  # fmt: skip
    return grad_x, grad_positions


def _tile(channels: int) -> dict[str, int]:
    """Points x channels of a program: 16 numbers a thread, and channels enough for whole lines of memory."""
    block = min(128, max(16, triton.next_power_of_2(channels)))
    return {"BLOCK_P": 2048 // block, "BLOCK_C": block}
