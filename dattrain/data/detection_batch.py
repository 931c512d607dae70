"""One micro-batch of images with the objects in them, as the engine gets it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from dattrain.data.annotations.instances import Instances
from dattrain.data.shared_buffer import SharedBatchBuffer, buffer, room

GRID = 112
"""Cells of a side of an object's mask: four times the 28 of the mask heads' targets, which are cut out of it."""

Shape = tuple[int, int, int]
"""Of ``images``: images, height, width; of ``masks``: objects, rows, columns."""


@dataclass(frozen=True)
class DetectionBatch:
    """B images with N objects in all, the images smaller than the largest padded at the right and at the bottom.

    An evaluation's batch has no targets (N = 0, ``masks`` 0 x 0 x 0), but the ``truth`` in their place.

    Attributes:
        images: B x 3 x H x W uint8 RGB; 0 in the padding. On the device.
        sizes: B x 2 int64 on the CPU, height and width without the padding.
        boxes: N x 4 float32, left, top, right and bottom in pixels of ``images``, one image's objects after another's. On the device.
        labels: N int64 on the device, from 0 on, without background.
        masks: N x G x G uint8 on the device, G = ``GRID``: how much of each cell of a grid over the object's own box the object
            covers, 255 being all; N x 0 x 0 where the head has no masks.
        counts: objects of each of the B images.
        weight: B float32 on the device: 0 for a bad sample, in whose place stands a small black image without objects, else 1.
        position: B int64 on the CPU: global positions in training, places in the set in evaluation.
        keys: B names, ``shard:key``.
        bad: (key, reason) of the samples that were skipped.
        emptied: images that have objects, of which their crop left none.
        truth: in evaluation the objects of each image, classes being the network's, boxes those of the image as it is stored.
        image_ids: in evaluation what the annotations call the images; the key where they call them nothing, or the sample is bad.
    """

    images: torch.Tensor
    sizes: torch.Tensor
    boxes: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor
    counts: tuple[int, ...]
    weight: torch.Tensor
    position: torch.Tensor
    keys: list[str]
    bad: tuple[tuple[str, str], ...] = ()
    emptied: int = 0
    truth: tuple[Instances, ...] = ()
    image_ids: tuple[int | str, ...] = ()
    slot: tuple[int, int] | None = field(default=None, repr=False)
    """In a worker: the buffer (``dattrain.data.shared_buffer``) and the slot that images and masks lie in."""

    def __len__(self) -> int:
        return len(self.keys)

    def __reduce__(self) -> tuple[Any, ...]:
        # As a classification batch's: small tensors as plain bytes, what lies in a buffer by its place there.
        shapes = tuple(self.images.shape[i] for i in (0, 2, 3)), tuple(self.masks.shape)
        pixels: Any = (self.images, self.masks) if self.slot is None else (*self.slot, *shapes)
        small = tuple(
            tensor.cpu().numpy()
            for tensor in (self.sizes, self.boxes, self.labels, self.weight, self.position)
        )
        rest = (self.counts, self.keys, self.bad, self.emptied, self.truth, self.image_ids)
        return _rebuild, (pixels, small, rest)

    @property
    def device_tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that ``to`` moves."""
        return self.images, self.boxes, self.labels, self.masks, self.weight

    def targets(self) -> list[dict[str, torch.Tensor] | None]:
        """Of each image ``boxes``, ``labels`` and, where there are any, ``masks``; None for a bad sample, which has no part in a loss."""
        bad = {key for key, _ in self.bad}
        flat = {"boxes": self.boxes, "labels": self.labels}
        if self.masks.shape[1]:
            flat["masks"] = self.masks
        parts = zip(*(tensor.split(self.counts) for tensor in flat.values()))
        return [None if key in bad else dict(zip(flat, own)) for key, own in zip(self.keys, parts)]

    def pin_memory(self) -> DetectionBatch:
        """In page-locked memory, from where copies to a GPU do not block (called by torch's pinning thread)."""
        return self._with([tensor.pin_memory() for tensor in self.device_tensors])

    def to(self, device: torch.device) -> DetectionBatch:
        """With images, targets and weight on ``device``; copies from pinned memory do not block."""
        return self._with([tensor.to(device, non_blocking=True) for tensor in self.device_tensors])

    def _with(self, tensors: Sequence[torch.Tensor]) -> DetectionBatch:
        images, boxes, labels, masks, weight = tensors
        return replace(self, images=images, boxes=boxes, labels=labels, masks=masks, weight=weight)


def bytes_of(images: Shape, masks: Shape) -> int:
    """Of images and masks together."""
    return 3 * math.prod(images) + math.prod(masks)


def empty(
    images: Shape, masks: Shape, among: SharedBatchBuffer | None
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int] | None]:
    """Uninitialised images (B x 3 x H x W), masks (N x G x G), and their slot: see ``shared_buffer.room``."""
    memory, slot = room(among, bytes_of(images, masks))
    return *_split(memory, images, masks), slot


def _split(memory: torch.Tensor, images: Shape, masks: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = 3 * math.prod(images)
    return memory[:pixels].view(images[0], 3, *images[1:]), memory[pixels:].view(masks)


def _rebuild(
    pixels: tuple[torch.Tensor, torch.Tensor] | tuple[int, int, Shape, Shape],
    small: Sequence[np.ndarray],
    rest: tuple[Any, ...],
) -> DetectionBatch:
    if len(pixels) == 4:
        number, slot, *shapes = pixels
        images, masks = _split(buffer(number).read(slot, bytes_of(*shapes)), *shapes)
    else:
        images, masks = pixels
    sizes, boxes, labels, weight, position = map(torch.from_numpy, small)
    counts, *others = rest
    return DetectionBatch(images, sizes, boxes, labels, masks, counts, weight, position, *others)
