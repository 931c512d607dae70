"""RandAugment and colour jitter of a plan on a whole uint8 batch, on the device where it is, to the bit what Pillow does.

DALI's own versions of these operations interpolate and round in other ways than Pillow, by which timm defines them. So
the DALI decoder hands its crops to this module. Which operation falls on which image stands in the plan, so images
are grouped on the host and nothing waits for the device. Arithmetic follows Pillow's C code: integers where it has
integers, single or double precision where it has those, truncation where it truncates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dattrain.data import randaugment
from dattrain.data.augment import Plan
from dattrain.data.randaugment import GEOMETRIC, Op

# Elementwise on the values of a channel, so a table of 256 entries says it all.
_TABLES = frozenset({Op.INVERT, Op.POSTERIZE, Op.SOLARIZE, Op.SOLARIZE_ADD, Op.BRIGHTNESS})
_JITTER = (Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR)
_CHUNK = 32


def augment(pixels: Tensor, plan: Plan, rows: NDArray[np.bool_]) -> None:
    """Carry out ``plan.ops`` and the colour jitter on some images, in place.

    Args:
        pixels: B x H x W x 3 uint8, cropped, resized and flipped.
        rows: B bool, which images; the others stay as they are.
    """
    for layer in range(plan.ops.shape[1]):
        _layer(pixels, plan.ops[:, layer], plan.args[:, layer], rows, plan)
    for turn in range(plan.jitter_order.shape[1]):
        which = plan.jitter_order[:, turn].astype(np.int64)
        factor = plan.jitter[np.arange(len(which)), which]
        ops = np.where(factor == 1, int(Op.NONE), np.asarray(_JITTER, dtype=np.int64)[which])
        _layer(pixels, ops, factor, rows, plan)


def _layer(
    pixels: Tensor,
    ops: NDArray[np.integer],
    args: NDArray[np.floating],
    rows: NDArray[np.bool_],
    plan: Plan,
) -> None:
    """One operation (or none) on each image."""
    groups: tuple[tuple[frozenset[Op], Callable[[Tensor, NDArray, NDArray], Tensor]], ...] = (
        (_TABLES, _by_table),
        (frozenset({Op.AUTO_CONTRAST}), lambda x, o, a: _autocontrast(x)),
        (frozenset({Op.EQUALIZE}), lambda x, o, a: _equalize(x)),
        (frozenset({Op.COLOR}), lambda x, o, a: _blend(_gray(x)[..., None], x, a)),
        (frozenset({Op.CONTRAST}), lambda x, o, a: _contrast(x, a)),
        (frozenset({Op.SHARPNESS}), lambda x, o, a: _blend(_smooth(x), x, a)),
        (GEOMETRIC, lambda x, o, a: _affine(x, o, a, plan)),
    )
    for members, function in groups:
        hit = np.flatnonzero(rows & np.isin(ops, [int(op) for op in members]))
        # Chunks bound the memory that the intermediate results take.
        for at in (hit[i : i + _CHUNK] for i in range(0, len(hit), _CHUNK)):
            index = torch.from_numpy(at).to(pixels.device)
            pixels[index] = function(pixels[index], ops[at], args[at])


def _by_table(x: Tensor, ops: NDArray[np.integer], args: NDArray[np.floating]) -> Tensor:
    tables = np.stack([_table(int(op), float(arg)) for op, arg in zip(ops, args)])
    return _look_up(x, torch.from_numpy(tables).to(x.device)[:, None].expand(-1, 3, -1))


@lru_cache(maxsize=4096)
def _table(op: int, argument: float) -> NDArray[np.uint8]:
    """What Pillow makes of each of the 256 values."""
    ramp = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2))
    done = randaugment.apply(ramp, op, argument, fill=(0, 0, 0), resample=Image.Resampling.NEAREST)
    return np.asarray(done)[0, :, 0].copy()


def _look_up(x: Tensor, table: Tensor) -> Tensor:
    """``x`` N x H x W x 3 uint8 through N x 3 x 256 tables (uint8)."""
    n, h, w, c = x.shape
    flat = x.permute(0, 3, 1, 2).reshape(n, c, h * w).long()
    return table.gather(2, flat).view(n, c, h, w).permute(0, 2, 3, 1)


def _histogram(x: Tensor) -> Tensor:
    """N x 3 x 256 int64."""
    n, _, _, c = x.shape
    row = torch.arange(n * c, device=x.device).view(n, 1, 1, c) * 256
    # In one dimension, where torch has a deterministic kernel on CUDA too.
    flat = (row + x).flatten()
    count = torch.zeros(n * c * 256, dtype=torch.int64, device=x.device)
    return count.scatter_add_(0, flat, torch.ones_like(flat)).view(n, c, 256)


def _autocontrast(x: Tensor) -> Tensor:
    low, high = x.amin((1, 2)).double()[..., None], x.amax((1, 2)).double()[..., None]
    values = torch.arange(256, dtype=torch.float64, device=x.device)
    # A division of tensors: torch turns that of a number by a tensor into a reciprocal, which rounds twice.
    scale = torch.full_like(high, 255.0) / (high - low).clamp(min=1)
    table = (values * scale - low * scale).trunc().clamp(0, 255)
    return _look_up(x, torch.where(high > low, table, values).to(torch.uint8))


def _equalize(x: Tensor) -> Tensor:
    count = _histogram(x)
    values = torch.arange(256, device=x.device)
    last = count.gather(2, torch.where(count > 0, values, 0).amax(2, keepdim=True))
    step = (count.sum(2, keepdim=True) - last) // 255
    before = count.cumsum(2) - count
    table = ((before + step // 2) // step.clamp(min=1)).clamp(0, 255)
    # A single value in the channel gives a step of 0 too, and is left as it is.
    return _look_up(x, torch.where(step > 0, table, values).to(torch.uint8))


def _gray(x: Tensor) -> Tensor:
    """Luma as ``Image.convert("L")`` has it (ITU-R 601-2, 16-bit fixed point): N x H x W int32."""
    r, g, b = x.int().unbind(-1)
    return (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16


def _contrast(x: Tensor, factor: NDArray[np.floating]) -> Tensor:
    n, h, w, _ = x.shape
    mean = (_gray(x).sum((1, 2), dtype=torch.int64).double() / (h * w) + 0.5).floor().int()
    values = torch.arange(256, dtype=torch.int32, device=x.device).expand(n, 3, 256)
    return _look_up(x, _blend(mean[:, None, None], values, factor))


def _smooth(x: Tensor) -> Tensor:
    """``ImageFilter.SMOOTH``: 1 1 1 / 1 5 1 / 1 1 1 over 13, rounded; the border stays. N x H x W x 3 int32."""
    v = x.int()
    rows = v[:, :-2] + v[:, 1:-1] + v[:, 2:]
    box = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    out = v.clone()
    out[:, 1:-1, 1:-1] = (2 * (box + 4 * v[:, 1:-1, 1:-1]) + 13) // 26
    return out


def _blend(degenerate: Tensor, x: Tensor, factor: NDArray[np.floating]) -> Tensor:
    """``Image.blend``: degenerate + factor * (x - degenerate) in single precision, clipped and truncated."""
    f = torch.from_numpy(factor.astype(np.float32)).to(x.device).view(-1, *[1] * (x.ndim - 1))
    start = degenerate.int()
    return (start.float() + f * (x.int() - start).float()).clamp(0, 255).to(torch.uint8)


def _matrix(op: int, argument: float, height: int, width: int) -> tuple[float, ...]:
    """Six numbers a b c d e f: output (x, y) samples input (ax + by + c, dx + ey + f)."""
    match op:
        case Op.SHEAR_X:
            return 1.0, argument, 0.0, 0.0, 1.0, 0.0
        case Op.SHEAR_Y:
            return 1.0, 0.0, 0.0, argument, 1.0, 0.0
        case Op.TRANSLATE_X:
            return 1.0, 0.0, argument * width, 0.0, 1.0, 0.0
        case Op.TRANSLATE_Y:
            return 1.0, 0.0, 0.0, 0.0, 1.0, argument * height
    # As ``Image.rotate``: about the centre, with the sine and cosine rounded to 15 digits.
    angle = -math.radians(argument % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y


def _affine(x: Tensor, ops: NDArray[np.integer], args: NDArray[np.floating], plan: Plan) -> Tensor:
    """``Image.transform`` with Pillow's bicubic (a = -1) or bilinear filter; what lies outside is ``plan.fill``."""
    n, h, w, _ = x.shape
    device = x.device
    rows = [_matrix(int(op), float(arg), h, w) for op, arg in zip(ops, args)]
    a, b, c, d, e, f = torch.tensor(rows, dtype=torch.float64).to(device).T[:, :, None, None]
    px = torch.arange(w, dtype=torch.float64, device=device)[None, None, :] + 0.5
    py = torch.arange(h, dtype=torch.float64, device=device)[None, :, None] + 0.5
    sx, sy = a * px + b * py + c, d * px + e * py + f
    inside = (sx >= 0) & (sx < w) & (sy >= 0) & (sy < h)
    sx, sy = sx - 0.5, sy - 0.5
    x0, y0 = sx.floor(), sy.floor()
    dx, dy = (sx - x0)[..., None], (sy - y0)[..., None]
    columns, lines = x0.long(), y0.long()
    image = torch.arange(n, device=device)[:, None, None]

    def tap(j: int, i: int) -> Tensor:
        return x[image, (lines + j).clamp(0, h - 1), (columns + i).clamp(0, w - 1)].double()

    if plan.interpolation == "bicubic":
        across = [_cubic(tap(j, -1), tap(j, 0), tap(j, 1), tap(j, 2), dx) for j in (-1, 0, 1, 2)]
        value = _cubic(across[0], across[1], across[2], across[3], dy)
    else:
        value = _linear(_linear(tap(0, 0), tap(0, 1), dx), _linear(tap(1, 0), tap(1, 1), dx), dy)
    fill = torch.tensor(plan.fill, dtype=torch.uint8).to(device)
    return torch.where(inside[..., None], value.clamp(0, 255).to(torch.uint8), fill)


def _linear(v1: Tensor, v2: Tensor, d: Tensor) -> Tensor:
    return v1 + (v2 - v1) * d


def _cubic(v1: Tensor, v2: Tensor, v3: Tensor, v4: Tensor, d: Tensor) -> Tensor:
    # In Pillow's order of operations, which decides the last bit.
    p2, p3, p4 = v3 - v1, 2 * (v1 - v2) + v3 - v4, v2 - v1 - v3 + v4
    return v2 + d * (p2 + d * (p3 + d * p4))
