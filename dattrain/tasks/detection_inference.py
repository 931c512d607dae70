"""From an image to its objects, at the image's own size: each image alone, resized, padded, and what is found brought back.

The rules are mmdetection's (2.11): ``simple_test``, whose boxes are divided by the factors of both sides, and ``_do_paste_mask``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dattrain.config.schema import Config
from dattrain.data.augment.dense_plan import resized_size
from dattrain.data.augment.dense_transforms import resize
from dattrain.data.augment.mixup import Normalize
from dattrain.tasks.base import Forward

THRESHOLD = 0.5
"""Least probability of a pixel of a mask."""


@dataclass(frozen=True)
class Objects:
    """N objects of an image, best first; tensors are on the device of the network.

    Attributes:
        boxes: N x 4 fp32, left, top, right and bottom edge in pixels of the image at its own size.
        scores: N fp32.
        classes: N int64, from 0.
        masks: N x G x G fp32, probabilities over each box (``paste``); None where the network gives boxes alone.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    masks: Tensor | None

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float) -> Objects:
        """Those of at least a score, but for boxes of which their image's edge has left nothing (R-CNN heads give them)."""
        there = (self.boxes[:, 2:] > self.boxes[:, :2]).all(1)
        kept = (self.scores >= score) & there
        masks = None if self.masks is None else self.masks[kept]
        return Objects(self.boxes[kept], self.scores[kept], self.classes[kept], masks)


class DetectionInference:
    """Each image as ``geometry.{short_side,long_side,pad_to}`` and ``augment.{mean,std,interpolation}`` say.

    Args:
        dtype: of the model's input.
    """

    def __init__(self, config: Config, dtype: torch.dtype) -> None:
        self._config, self._dtype = config, dtype
        self._normalize = Normalize(config.augment)

    def __call__(self, forward: Forward, image: Tensor) -> Objects:
        """The objects of an image.

        Args:
            forward: the detector, in evaluation mode.
            image: 3 x H x W uint8, at its own size.
        """
        geometry = self._config.geometry
        height, width = image.shape[1:]
        size = resized_size(height, width, short_side=geometry.short_side, long_side=geometry.long_side)
        pixels = self._normalize(resize(image, size, self._config.augment.interpolation)[None])
        (found,) = forward(self._padded(pixels), [size])
        boxes = found["boxes"].float()
        factors = boxes.new_tensor([width / size[1], height / size[0]]).repeat(2)
        return Objects(boxes * factors, found["scores"].float(), found["labels"], found.get("masks"))

    def nothing(self, forward: Forward, device: torch.device) -> None:
        """Call the model as often as for an image, where a rank has none but the others do."""
        step = self._config.geometry.pad_to
        forward(self._padded(torch.zeros(1, 3, step, step, device=device)), [(step, step)])

    def _padded(self, images: Tensor) -> Tensor:
        """Zeros at the right and at the bottom, after normalisation."""
        step = self._config.geometry.pad_to
        images = F.pad(images, (0, -images.shape[3] % step, 0, -images.shape[2] % step))
        kind = torch.channels_last if self._config.train.channels_last else torch.contiguous_format
        return images.to(self._dtype, memory_format=kind)


@dataclass(frozen=True)
class Pasted:
    """A mask where it lies: ``pixels`` is h x w bool, ``top`` and ``left`` its place in the image; h or w may be 0."""

    top: int
    left: int
    pixels: Tensor

    def at(self, size: tuple[int, int]) -> Tensor:
        """The mask over the whole image, H x W bool."""
        whole = self.pixels.new_zeros(size)
        height, width = self.pixels.shape
        whole[self.top : self.top + height, self.left : self.left + width] = self.pixels
        return whole


def paste(probability: Tensor, box: Tensor, size: tuple[int, int]) -> Pasted:
    """The pixels of an object whose probability is ``THRESHOLD`` or more, bilinear between the cells of its box.

    Only the box is laid out, since a photograph's hundred masks at full size would take a gigabyte.

    Args:
        probability: G x G.
        box: 4 fp32: left, top, right and bottom edge in pixels.
        size: height and width of the image.
    """
    left, top, right, bottom = box.tolist()
    rows = _within(top, bottom, size[0])
    columns = _within(left, right, size[1])
    empty = right <= left or bottom <= top
    y, x = (
        ((torch.arange(*span, device=box.device) + 0.5 - low) / max(high - low, 1e-9)) * 2 - 1
        for span, low, high in ((rows, top, bottom), (columns, left, right))
    )
    if empty or not len(y) or not len(x):
        return Pasted(rows[0], columns[0], torch.zeros(len(y), len(x), dtype=torch.bool, device=box.device))
    grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], -1)
    values = F.grid_sample(probability[None, None].float(), grid[None], align_corners=False)
    return Pasted(rows[0], columns[0], values[0, 0] >= THRESHOLD)


def _within(low: float, high: float, side: int) -> tuple[int, int]:
    """First and last pixel (exclusive) of a side that a box touches."""
    first = min(max(int(low // 1), 0), side)
    return first, max(first, min(int(-(-high // 1)), side))
