"""What a dense plan says, done to one image and its map of classes: uint8 in, uint8 out, every pixel resampled once.

Everything is torch's operations on the tensors' own device, in the order of mmseg's pipeline: resize, crop, flip, distort. A crop
of a class too frequent is refused on the map's pixels before the image is touched. Padding is a batch's matter
(``dattrain.data.decode.dense``), and ``normalised`` what the network gets of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dattrain.data.annotations.semantic import VOID
from dattrain.data.augment.dense_plan import DensePlan, crop_window
from dattrain.data.to_device import to_device


class PaddedBatch(Protocol):
    """B images that are padded at the right and at the bottom to the largest of them."""

    @property
    def images(self) -> Tensor:
        """B x 3 x H x W uint8."""

    @property
    def sizes(self) -> Tensor:
        """B x 2 int64 on the CPU, height and width without the padding."""


def train_sample(image: Tensor, classes: Tensor, plan: DensePlan, sample: int) -> tuple[Tensor, Tensor]:
    """Image and map as sample ``sample`` of the plan says, not padded: smaller than ``plan.crop`` where the resized image is.

    Args:
        image: 3 x H x W uint8.
        classes: H x W uint8 on the same device, 255 where nothing is labelled.
    """
    size = plan.resized(sample, *classes.shape)
    (rows, columns), classes = choose_crop(classes, size, plan, sample)
    image = resize(image, size, plan.interpolation)[:, rows, columns]
    if plan.flip[sample]:
        image, classes = image.flip(2), classes.flip(1)
    return distort(image, plan, sample), classes


def choose_crop(
    classes: Tensor, size: tuple[int, int], plan: DensePlan, sample: int
) -> tuple[tuple[slice, slice], Tensor]:
    """Rows and columns of the crop of a map (H x W uint8) that is resized to ``size``, and the crop.

    Of the places drawn the first is taken where no class has more than ``max_class_share`` of the labelled pixels, else the
    last; one without labelled pixels does not count as such. mmseg's RandomCrop, ``cat_max_ratio``.
    """
    if plan.crop is None:
        return (slice(0, size[0]), slice(0, size[1])), nearest(classes, size)
    boxes = [crop_window(size, plan.crop, place) for place in plan.place[sample].tolist()]
    if plan.max_class_share == 1 or all(side <= crop for side, crop in zip(size, plan.crop)):
        boxes = boxes[:1]
    for box in boxes[:-1]:
        crop = nearest(classes, size, box)
        counts = torch.bincount(crop.reshape(-1), minlength=VOID + 1)[:VOID]
        if 0 < int(counts.max()) <= plan.max_class_share * int(counts.sum()):
            return box, crop
    return boxes[-1], nearest(classes, size, boxes[-1])


def resize(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Antialiased resize of 3 x H x W uint8 to ``size``, as torchvision's (v2) does it on CPU and GPU."""
    if tuple(image.shape[1:]) == size:
        return image
    batch = image[None].contiguous(memory_format=torch.channels_last)
    if image.device.type == "cpu":
        return F.interpolate(batch, size=size, mode=interpolation, antialias=True)[0]
    return resize_floats(batch, size, interpolation)[0]


def resize_floats(batch: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """The same of B x 3 x H x W by kernels of floats, as devices other than the CPU have alone: it differs by a level at most."""
    resized = F.interpolate(batch.float(), size=size, mode=interpolation, antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def nearest(classes: Tensor, size: tuple[int, int], box: tuple[slice, slice] | None = None) -> Tensor:
    """H x W resized to ``size`` by taking the pixel that holds the centre of each new one, as Pillow does.

    ``box`` (rows, columns) is the part that is wanted; None is all.
    """
    parts = box or (slice(0, size[0]), slice(0, size[1]))
    for axis, (old, new, part) in enumerate(zip(classes.shape, size, parts)):
        wanted = torch.arange(part.start, part.stop, device=classes.device)
        # In whole numbers, so that it is the same everywhere.
        classes = classes.index_select(axis, (2 * wanted + 1) * old // (2 * new))
    return classes


def distort(image: Tensor, plan: DensePlan, sample: int) -> Tensor:
    """Photometric distortion of 3 x H x W uint8: brightness, then contrast, saturation and hue in the order of the plan.

    mmseg's PhotoMetricDistortion with HSV as OpenCV's for uint8: values are held within 0 to 255 after brightness and
    after contrast, and saturation at its most. What mmseg cuts to whole numbers after each step is rounded once at the end.
    """
    brightness, contrast, saturation, hue = (
        float(values[sample]) for values in (plan.brightness, plan.contrast, plan.saturation, plan.hue)
    )
    if (brightness, contrast, saturation, hue) == (0, 1, 1, 0):
        return image
    pixels = image.to(torch.float32, memory_format=torch.contiguous_format)
    if brightness:
        pixels = pixels.add_(brightness).clamp_(0, 255)
    if contrast != 1 and plan.contrast_first[sample]:
        pixels = pixels.mul_(contrast).clamp_(0, 255)
    if saturation != 1:
        pixels = saturate(pixels, saturation)
    if hue:
        pixels = turn_hue(pixels, hue)
    if contrast != 1 and not plan.contrast_first[sample]:
        pixels = pixels.mul_(contrast).clamp_(0, 255)
    return pixels.round_().to(torch.uint8)


def saturate(pixels: Tensor, factor: float) -> Tensor:
    """HSV's saturation times ``factor``, at most 1, of 3 x H x W float32, in place; hue and value stay.

    With value V and saturation S a channel is V - V S f, f being of the hue alone: so its distance from V is multiplied by
    min(factor, 1 / S), and S = (V - least) / V.
    """
    value, chroma = _value_and_chroma(pixels)
    times = torch.where(chroma * factor > value, value / chroma.clamp(min=1e-6), factor)
    return pixels.sub_(value).mul_(times).add_(value)


def turn_hue(pixels: Tensor, degrees: float) -> Tensor:
    """HSV's hue plus ``degrees``, of 3 x H x W float32, in place; saturation and value stay."""
    red, green, blue = pixels
    value, chroma = _value_and_chroma(pixels)
    # Hue in sixths of the circle, by which channel is the largest (Smith, "Color gamut transform pairs", SIGGRAPH 1978).
    sixths = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4)),
    )
    sixths = sixths.div_(chroma.clamp(min=1e-6)).add_(degrees / 60).remainder_(6)
    least = value.sub_(chroma)
    # Of the way from the least channel to the largest: a trapezoid around each colour's own place on the circle.
    pixels[0] = (sixths - 3).abs_().sub_(1).clamp_(0, 1).mul_(chroma).add_(least)
    pixels[1] = (sixths - 2).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma).add_(least)
    pixels[2] = (sixths - 4).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma).add_(least)
    return pixels


def _value_and_chroma(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The largest channel, and how far the least is from it: H x W each."""
    red, green, blue = pixels
    value = torch.maximum(torch.maximum(red, green), blue)
    return value, value - torch.minimum(torch.minimum(red, green), blue)


def normalised(
    batch: PaddedBatch, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """What the network gets of a batch: B x 3 x H x W of ``dtype``, zero mean and unit deviation, on the batch's device.

    Normalised first, then the padding set to 0, which is the mean colour; the padding of uint8 0 would be black.

    Args:
        mean, std: per channel, of images in [0, 1].
    """
    device = batch.images.device
    scale, shift = (
        to_device(values.view(3, 1, 1), device)
        for values in (1.0 / (255.0 * torch.tensor(std)), -torch.tensor(mean) / torch.tensor(std))
    )
    pixels = batch.images.to(torch.float32, memory_format=torch.contiguous_format).mul_(scale).add_(shift)
    rows, columns = (torch.arange(side, device=device) for side in pixels.shape[2:])
    heights, widths = to_device(batch.sizes, device)[:, :, None].unbind(1)
    padding = (rows >= heights)[:, :, None] | (columns >= widths)[:, None, :]
    return pixels.masked_fill_(padding[:, None], 0.0).to(dtype)
