"""What a dense plan says, done to one image and its map of classes: uint8 in, uint8 out, every pixel resampled once.

Everything is torch's operations on the tensors' own device, in the order of mmseg's pipeline: resize, crop, flip, distort. A crop
of a class too frequent is refused on the map's pixels before the image is touched. Padding is a batch's matter
(``dattrain.data.decode.dense``), and ``normalised`` what the network gets of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dattrain.data.annotations.semantic import VOID
from dattrain.data.augment.dense_plan import DensePlan, resized_size
from dattrain.data.dense_batch import SegmentationBatch
from dattrain.data.to_device import to_device


def train_sample(image: Tensor, classes: Tensor, plan: DensePlan, sample: int) -> tuple[Tensor, Tensor]:
    """Image and map as sample ``sample`` of the plan says, not padded: smaller than ``plan.crop`` where the resized image is.

    Args:
        image: 3 x H x W uint8.
        classes: H x W uint8 on the same device, 255 where nothing is labelled.
    """
    size = resized_size(
        *classes.shape,
        short_side=plan.short_side,
        long_side=plan.long_side,
        scale=float(plan.scale[sample]),
    )
    classes = nearest(classes, size)
    box = choose_crop(classes, plan, sample)
    image, classes = resize(image, size, plan.interpolation)[:, box[0], box[1]], classes[box]
    if plan.flip[sample]:
        image, classes = image.flip(2), classes.flip(1)
    return distort(image, plan, sample), classes


def choose_crop(classes: Tensor, plan: DensePlan, sample: int) -> tuple[slice, slice]:
    """Rows and columns of the crop of a resized map (H x W uint8).

    Of the places drawn the first is taken where no class has more than ``max_class_share`` of the labelled pixels, else the
    last; one without labelled pixels does not count as such. mmseg's RandomCrop, ``cat_max_ratio``.
    """
    if plan.crop is None:
        return slice(None), slice(None)
    height, width = classes.shape
    room = [max(side - crop, 0) for side, crop in zip((height, width), plan.crop)]
    boxes = []
    for place in plan.place[sample]:
        # A draw is below 1, but times a whole number it may round up to that number.
        top, left = (min(int(u * (free + 1)), free) for u, free in zip(place.tolist(), room))
        boxes.append((slice(top, top + plan.crop[0]), slice(left, left + plan.crop[1])))
    if plan.max_class_share == 1 or room == [0, 0]:
        return boxes[0]
    for box in boxes[:-1]:
        counts = torch.bincount(classes[box].reshape(-1), minlength=VOID + 1)[:VOID]
        if 0 < int(counts.max()) <= plan.max_class_share * int(counts.sum()):
            return box
    return boxes[-1]


def resize(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Antialiased resize of 3 x H x W uint8 to ``size``, as torchvision's (v2) does it on CPU and GPU."""
    if tuple(image.shape[1:]) == size:
        return image
    batch = image[None].contiguous(memory_format=torch.channels_last)
    if image.device.type == "cpu":
        return F.interpolate(batch, size=size, mode=interpolation, antialias=True)[0]
    # Kernels elsewhere have no uint8.
    resized = F.interpolate(batch.float(), size=size, mode=interpolation, antialias=True)[0]
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def nearest(classes: Tensor, size: tuple[int, int]) -> Tensor:
    """H x W resized to ``size`` by taking the pixel that holds the centre of each new one, as Pillow does."""
    rows, columns = (
        # In whole numbers, so that it is the same everywhere.
        (2 * torch.arange(new, device=classes.device) + 1) * old // (2 * new)
        for old, new in zip(classes.shape, size)
    )
    return classes[rows][:, columns]


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
    """HSV's saturation times ``factor``, at most 1, of 3 x H x W float32; hue and value stay.

    With value V and saturation S a channel is V - V S f, f being of the hue alone: so its distance from V is multiplied by
    min(factor, 1 / S), and S = (V - least) / V.
    """
    value = pixels.amax(0)
    chroma = value - pixels.amin(0)
    times = torch.where(chroma * factor > value, value / chroma.clamp(min=1e-6), factor)
    return value - (value - pixels) * times


def turn_hue(pixels: Tensor, degrees: float) -> Tensor:
    """HSV's hue plus ``degrees``, of 3 x H x W float32; saturation and value stay."""
    red, green, blue = pixels
    value = pixels.amax(0)
    chroma = value - pixels.amin(0)
    # Hue in sixths of the circle, by which channel is the largest (Smith, "Color gamut transform pairs", SIGGRAPH 1978).
    hue = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma),
    ) / chroma.clamp(min=1e-6)
    hue += degrees / 60
    # A channel is V - chroma * max(0, min(k, 4 - k, 1)), k = (n + hue) mod 6, n = 5, 3, 1.
    out = torch.empty_like(pixels)
    for channel, n in enumerate((5, 3, 1)):
        k = (hue + n).remainder_(6)
        out[channel] = value - torch.minimum(k, 4 - k).clamp_(0, 1).mul_(chroma)
    return out


def normalised(
    batch: SegmentationBatch, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
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
    height, width = pixels.shape[2:]
    if bool((batch.sizes != torch.tensor([height, width])).any()):
        sizes = to_device(batch.sizes, device)
        for axis, side in ((0, height), (1, width)):
            outside = torch.arange(side, device=device) >= sizes[:, axis, None]
            shape = (-1, 1, side, 1) if axis == 0 else (-1, 1, 1, side)
            pixels.masked_fill_(outside.view(shape), 0.0)
    return pixels.to(dtype)
