"""What a plan says, done to one decoded image on the CPU: uint8 in, uint8 out, every pixel resampled once.

Images are 3 x H x W in channels-last memory throughout, which is how the JPEG decoder delivers them, how torch's
fast uint8 resize and Pillow want them, and what makes a batch a row of plain copies.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance

from dattrain.data.augment import randaugment
from dattrain.data.augment.plan import AugmentPlan, eval_geometry, source_edges

_WHOLE = 8
"""An image whose resized form has more than this many times the pixels of the part that is taken from it (one 6 times as long as
wide, at a crop of 0.875) is cropped before it is resized."""
_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_SUPPORT = {"bicubic": 2, "bilinear": 1}
"""Reach of the filters, in pixels of the coarser side."""
_JITTER = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def train_image(
    image: torch.Tensor,
    plan: AugmentPlan,
    sample: int,
    out: torch.Tensor,
    *,
    size: tuple[int, int] | None = None,
    factor: int = 1,
) -> None:
    """Crop, resize, flip and augment as sample ``sample`` of the plan says.

    Args:
        image: 3 x H x W uint8.
        out: height x width x 3 uint8, written.
        size: height and width of the file; None where ``image`` has them.
        factor: by which ``image`` was reduced: 1, or that of the plan's region.
    """
    region = plan.region(sample, *(size or image.shape[1:]))
    top, left, height, width = (edge // factor for edge in region[:4])
    crop = image[:, top : top + height, left : left + width]
    pixels = resize(crop, plan.size, plan.interpolation).permute(1, 2, 0)
    if plan.flip[sample]:
        pixels = pixels.flip(1)
    if plan.recoloured[sample]:
        pixels = _with_pillow(pixels, plan, sample)
    out.copy_(pixels)


def eval_image(
    image: torch.Tensor,
    size: tuple[int, int],
    out: torch.Tensor,
    *,
    policy: str,
    crop_pct: float,
    interpolation: str,
) -> None:
    """Resize and crop as ``eval_geometry`` says; ``image`` and ``out`` as for ``train_image``."""
    resized, corner = eval_geometry(image.shape[1], image.shape[2], size, resize=policy, crop_pct=crop_pct)
    out.copy_(resize_window(image, resized, corner, size, interpolation).permute(1, 2, 0))


def resize_window(
    image: torch.Tensor,
    resized: tuple[int, int],
    corner: tuple[int, int],
    size: tuple[int, int],
    interpolation: str,
) -> torch.Tensor:
    """The part ``corner`` (top, left), ``size`` of ``resize(image, resized, interpolation)``: 3 x size uint8.

    Of a thin image, whose resized form would have up to ``MAX_SIDE`` times the part's pixels, only what the part depends on is
    resized. Pillow does that, which takes the part's edges as fractions of source pixels and reads beyond them as
    far as its filter reaches; ``resize`` says what it rounds otherwise.
    """
    (top, left), (height, width) = corner, size
    if math.prod(resized) <= _WHOLE * height * width:
        return resize(image, resized, interpolation)[:, top : top + height, left : left + width]
    (y0, y1, rows), (x0, x1, columns) = (
        _reach(side, low, high, length, _SUPPORT[interpolation])
        for side, low, high, length in zip(
            image.shape[1:], *source_edges(image.shape[1:], resized, corner, size), size
        )
    )
    pixels = Image.fromarray(np.ascontiguousarray(image[:, rows, columns].permute(1, 2, 0).numpy()))
    done = pixels.resize((width, height), _RESAMPLE[interpolation], box=(x0, y0, x1, y1))
    return torch.from_numpy(np.array(done)).permute(2, 0, 1)


def _reach(side: int, low: float, high: float, length: int, support: int) -> tuple[float, float, slice]:
    """The stretch ``low`` to ``high`` of a side, counted from the first pixel that a filter reads for it, and those pixels.

    The filter makes ``length`` pixels of the stretch. Pillow keeps it in single precision, and chooses by the shape of what it
    gets along which side it works first.
    """
    reach = support * max((high - low) / length, 1.0) + 1
    first, last = max(0, math.floor(low - reach)), min(side, math.ceil(high + reach))
    return low - first, min(high, last) - first, slice(first, last)


def resize(image: torch.Tensor, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """Antialiased resize of 3 x H x W uint8 to ``size``: torchvision's (v2) tensor path.

    Pillow's differs by one level where roundings tip, and by a few at isolated pixels whose overshoot is clipped between
    the two passes.
    """
    batch = image[None].contiguous(memory_format=torch.channels_last)
    if tuple(image.shape[1:]) == size:
        return batch[0]
    return F.interpolate(batch, size=size, mode=interpolation, antialias=True)[0]


def _with_pillow(pixels: torch.Tensor, plan: AugmentPlan, sample: int) -> torch.Tensor:
    """RandAugment and colour jitter on H x W x 3; Pillow, because these operations are defined by what it does."""
    image = Image.fromarray(pixels.numpy())
    resample = _RESAMPLE[plan.interpolation]
    for op, argument in zip(plan.ops[sample].tolist(), plan.args[sample].tolist()):
        image = randaugment.apply(image, op, argument, fill=plan.fill, resample=resample)
    for which in plan.jitter_order[sample].tolist():
        if plan.jitter[sample, which] != 1:
            image = _JITTER[which](image).enhance(float(plan.jitter[sample, which]))
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
