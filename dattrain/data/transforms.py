"""What a plan says, done to one decoded image on the CPU: uint8 in, uint8 out, every pixel resampled once.

Images are 3 x H x W in channels-last memory throughout, which is how the JPEG decoder delivers them, how torch's
fast uint8 resize and Pillow want them, and what makes a batch a row of plain copies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance

from dattrain.data import randaugment
from dattrain.data.augment import Plan, crop_box, eval_geometry

_JITTER = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def train_image(image: torch.Tensor, plan: Plan, sample: int, out: torch.Tensor) -> None:
    """Crop, resize, flip and augment as sample ``sample`` of the plan says.

    Args:
        image: 3 x H x W uint8.
        out: height x width x 3 uint8, written.
    """
    top, left, height, width = crop_box(plan.crop[sample], image.shape[1], image.shape[2], plan.crop_ratio)
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
    resized, (top, left) = eval_geometry(
        image.shape[1], image.shape[2], size, resize=policy, crop_pct=crop_pct
    )
    pixels = resize(image, resized, interpolation)
    out.copy_(pixels[:, top : top + size[0], left : left + size[1]].permute(1, 2, 0))


def resize(image: torch.Tensor, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """Antialiased resize of 3 x H x W uint8 to ``size``: torchvision's (v2) tensor path.

    Pillow's differs by one level where roundings tip, and by a few at isolated pixels whose overshoot is clipped between
    the two passes.
    """
    batch = image[None].contiguous(memory_format=torch.channels_last)
    if tuple(image.shape[1:]) == size:
        return batch[0]
    return F.interpolate(batch, size=size, mode=interpolation, antialias=True)[0]


def _with_pillow(pixels: torch.Tensor, plan: Plan, sample: int) -> torch.Tensor:
    """RandAugment and colour jitter on H x W x 3; Pillow, because these operations are defined by what it does."""
    image = Image.fromarray(pixels.numpy())
    resample = Image.Resampling.BICUBIC if plan.interpolation == "bicubic" else Image.Resampling.BILINEAR
    for op, argument in zip(plan.ops[sample].tolist(), plan.args[sample].tolist()):
        image = randaugment.apply(image, op, argument, fill=plan.fill, resample=resample)
    for which in plan.jitter_order[sample].tolist():
        if plan.jitter[sample, which] != 1:
            image = _JITTER[which](image).enhance(float(plan.jitter[sample, which]))
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
