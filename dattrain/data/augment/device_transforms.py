"""RandAugment and colour jitter of a plan on a whole uint8 batch, on the device where it is, to the bit what Pillow does.

DALI's own versions of these operations interpolate and round in other ways than Pillow, by which timm defines them. So
the DALI decoder hands its crops to this module. Which operation falls on which image stands in the plan, so all that the
operations need (indices, tables, factors, matrices) is computed on the host beforehand (``prepare``); it goes to the device
in one copy (``to_device.stage``), and what runs there (``carry_out``) neither copies from the host nor waits for the device.
Arithmetic follows Pillow's C code: integers where it has integers, single or double precision where it has those,
truncation where it truncates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dattrain.data.augment import randaugment
from dattrain.data.augment.plan import AugmentPlan
from dattrain.data.augment.randaugment import GEOMETRIC, Op
from dattrain.data.to_device import stage

# Elementwise on the values of a channel, so a table of 256 entries says it all.
_TABLES = frozenset({Op.INVERT, Op.POSTERIZE, Op.SOLARIZE, Op.SOLARIZE_ADD, Op.BRIGHTNESS})
_JITTER = (Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR)
_CHUNK = 32


Function = Callable[..., Tensor]
"""N x H x W x 3 uint8 images and the tensors of their arguments to images of the same shape and dtype."""


@dataclass
class Work:
    """The operations on a batch, in their order.

    Attributes:
        steps: a function, the place of its images' indices in ``arrays``, and the places of its further arguments.
        arrays: everything that the functions need, on the host.
    """

    steps: list[tuple[Function, int, tuple[int, ...]]] = field(default_factory=list)
    arrays: list[NDArray[Any]] = field(default_factory=list)

    def add(self, function: Function, index: NDArray[np.int64], *arguments: NDArray[Any]) -> None:
        """Append a step."""
        first = len(self.arrays)
        self.arrays += [index, *arguments]
        self.steps.append((function, first, tuple(range(first + 1, first + 1 + len(arguments)))))


def augment(pixels: Tensor, plan: AugmentPlan, rows: NDArray[np.bool_]) -> None:
    """Carry out ``plan.ops`` and the colour jitter on some images, in place.

    Args:
        pixels: B x H x W x 3 uint8, cropped, resized and flipped.
        rows: B bool, which images; the others stay as they are.
    """
    work = prepare(plan, rows)
    carry_out(pixels, work, stage(work.arrays, pixels.device))


def prepare(plan: AugmentPlan, rows: NDArray[np.bool_]) -> Work:
    """The work on the images that ``rows`` (B bool) names. On the host alone."""
    work = Work()
    for layer in range(plan.ops.shape[1]):
        _layer(work, plan.ops[:, layer], plan.args[:, layer], rows, plan)
    for turn in range(plan.jitter_order.shape[1]):
        which = plan.jitter_order[:, turn].astype(np.int64)
        factor = plan.jitter[np.arange(len(which)), which]
        ops = np.where(factor == 1, int(Op.NONE), np.asarray(_JITTER, dtype=np.int64)[which])
        _layer(work, ops, factor, rows, plan)
    return work


def carry_out(pixels: Tensor, work: Work, staged: Sequence[Tensor]) -> None:
    """Do the work on ``pixels`` (B x H x W x 3 uint8), in place; ``staged`` are ``work.arrays`` on the same device."""
    for function, index, arguments in work.steps:
        pixels[staged[index]] = function(pixels[staged[index]], *(staged[at] for at in arguments))


def _layer(
    work: Work,
    ops: NDArray[np.integer],
    args: NDArray[np.floating],
    rows: NDArray[np.bool_],
    plan: AugmentPlan,
) -> None:
    """One operation (or none) on each image."""
    affine = partial(_affine, plan.interpolation)
    fill = np.asarray(plan.fill, dtype=np.uint8)
    groups: tuple[
        tuple[frozenset[Op], Function, Callable[[NDArray[Any], NDArray[Any]], tuple[NDArray[Any], ...]]], ...
    ] = (
        (_TABLES, _look_up, lambda o, a: (_tables(o, a),)),
        (frozenset({Op.AUTO_CONTRAST}), _autocontrast, lambda o, a: ()),
        (frozenset({Op.EQUALIZE}), _equalize, lambda o, a: ()),
        (frozenset({Op.COLOR}), _color, lambda o, a: (a.astype(np.float32),)),
        (frozenset({Op.CONTRAST}), _contrast, lambda o, a: (a.astype(np.float32),)),
        (frozenset({Op.SHARPNESS}), _sharpness, lambda o, a: (a.astype(np.float32),)),
        (GEOMETRIC, affine, lambda o, a: (_matrices(o, a, plan.size), fill)),
    )
    for members, function, arguments in groups:
        hit = np.flatnonzero(rows & np.isin(ops, [int(op) for op in members]))
        # Chunks bound the memory that the intermediate results take.
        for at in (hit[i : i + _CHUNK] for i in range(0, len(hit), _CHUNK)):
            work.add(function, at, *arguments(ops[at], args[at]))


def _tables(ops: NDArray[np.integer], args: NDArray[np.floating]) -> NDArray[np.uint8]:
    """N x 1 x 256: one table for all channels of an image."""
    return np.stack([_table(int(op), float(arg)) for op, arg in zip(ops, args)])[:, None]


@lru_cache(maxsize=4096)
def _table(op: int, argument: float) -> NDArray[np.uint8]:
    """What Pillow makes of each of the 256 values."""
    ramp = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2))
    done = randaugment.apply(ramp, op, argument, fill=(0, 0, 0), resample=Image.Resampling.NEAREST)
    return np.asarray(done)[0, :, 0].copy()


def _places(x: Tensor, channels: int) -> Tensor:
    """Where the values of ``x`` N x H x W x 3 stand in N x ``channels`` x 256 tables (1 or 3 channels): int64."""
    n = len(x)
    start = torch.arange(n * channels, device=x.device).view(n, 1, 1, channels) * 256
    return start + x


def _look_up(x: Tensor, table: Tensor) -> Tensor:
    """``x`` N x H x W x 3 uint8 through N x 1 x 256 or N x 3 x 256 tables (uint8)."""
    return table.take(_places(x, table.shape[1]))


def _histogram(x: Tensor) -> Tensor:
    """N x 3 x 256 int64."""
    n, _, _, c = x.shape
    # In one dimension, where torch has a deterministic kernel on CUDA too.
    flat = _places(x, c).flatten()
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


def _color(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(_gray(x)[..., None], x, factor)


def _sharpness(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(_smooth(x), x, factor)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    n, h, w, _ = x.shape
    mean = (_gray(x).sum((1, 2), dtype=torch.int64).double() / (h * w) + 0.5).floor().int()
    values = torch.arange(256, dtype=torch.int32, device=x.device).expand(n, 1, 256)
    return _look_up(x, _blend(mean[:, None, None], values, factor))


def _smooth(x: Tensor) -> Tensor:
    """``ImageFilter.SMOOTH``: 1 1 1 / 1 5 1 / 1 1 1 over 13, rounded; the border stays. N x H x W x 3 int32."""
    v = x.int()
    rows = v[:, :-2] + v[:, 1:-1] + v[:, 2:]
    box = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    out = v.clone()
    out[:, 1:-1, 1:-1] = (2 * (box + 4 * v[:, 1:-1, 1:-1]) + 13) // 26
    return out


def _blend(degenerate: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """``Image.blend``: degenerate + factor * (x - degenerate) in single precision, clipped and truncated.

    ``factor`` is N float32, the others N x ... integers.
    """
    f = factor.view(-1, *[1] * (x.ndim - 1))
    start = degenerate.int()
    return (start.float() + f * (x.int() - start).float()).clamp(0, 255).to(torch.uint8)


def _matrices(
    ops: NDArray[np.integer], args: NDArray[np.floating], size: tuple[int, int]
) -> NDArray[np.float64]:
    """6 x N: see ``_matrix``."""
    rows = [_matrix(int(op), float(arg), *size) for op, arg in zip(ops, args)]
    return np.ascontiguousarray(np.asarray(rows, dtype=np.float64).T)


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


def _affine(interpolation: str, x: Tensor, matrices: Tensor, fill: Tensor) -> Tensor:
    """``Image.transform`` with Pillow's bicubic (a = -1) or bilinear filter; what lies outside is ``fill`` (3 uint8).

    ``matrices`` are 6 x N float64, from output to input coordinates.
    """
    n, h, w, _ = x.shape
    a, b, c, d, e, f = matrices[:, :, None, None]
    px = torch.arange(w, dtype=torch.float64, device=x.device)[None, None, :] + 0.5
    py = torch.arange(h, dtype=torch.float64, device=x.device)[None, :, None] + 0.5
    sx, sy = a * px + b * py + c, d * px + e * py + f
    inside = (sx >= 0) & (sx < w) & (sy >= 0) & (sy < h)
    sx, sy = sx - 0.5, sy - 0.5
    x0, y0 = sx.floor(), sy.floor()
    dx, dy = (sx - x0)[..., None], (sy - y0)[..., None]
    reach = 4 if interpolation == "bicubic" else 2
    steps = torch.arange(reach, device=x.device).view(-1, 1, 1, 1) - (reach // 2 - 1)
    # One gather brings a line of neighbours for every pixel: reach x N x H x W places in the flat images.
    columns = (x0.long() + steps).clamp(0, w - 1)
    lines = (y0.long() + steps).clamp(0, h - 1) * w
    lines += torch.arange(n, device=x.device).view(n, 1, 1) * (h * w)
    flat = x.reshape(-1, 3)
    between = _cubic if interpolation == "bicubic" else _linear
    across = [between(flat[columns + line].double(), dx) for line in lines]
    value = between(across, dy)
    return torch.where(inside[..., None], value.clamp(0, 255).to(torch.uint8), fill)


def _linear(taps: Tensor | list[Tensor], d: Tensor) -> Tensor:
    v1, v2 = taps
    return v1 + (v2 - v1) * d


def _cubic(taps: Tensor | list[Tensor], d: Tensor) -> Tensor:
    v1, v2, v3, v4 = taps
    # In Pillow's order of operations, which decides the last bit.
    p2, p3, p4 = v3 - v1, 2 * (v1 - v2) + v3 - v4, v2 - v1 - v3 + v4
    return v2 + d * (p2 + d * (p3 + d * p4))
