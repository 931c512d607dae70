"""One micro-batch of images with a class for every pixel, as the engine gets it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from dattrain.data.shared_buffer import SharedBatchBuffer, buffer, room

Shape = tuple[int, int, int]
"""Images, height, width."""


@dataclass(frozen=True)
class SegmentationBatch:
    """B images with their maps, those smaller than the largest padded at the right and at the bottom.

    Attributes:
        images: B x 3 x H x W uint8 RGB; 0 in the padding. On the device.
        maps: B x H x W uint8 on the device, the class of each pixel; 255 (void) where there is none, and in the padding.
        sizes: B x 2 int64 on the CPU, height and width without the padding.
        weight: B float32 on the device: 0 for a bad sample, in whose place stands a small black image of nothing but void, else 1.
        position: B int64 on the CPU: global positions in training, places in the set in evaluation.
        keys: B names, ``shard:key``.
        bad: (key, reason) of the samples that were skipped.
    """

    images: torch.Tensor
    maps: torch.Tensor
    sizes: torch.Tensor
    weight: torch.Tensor
    position: torch.Tensor
    keys: list[str]
    bad: tuple[tuple[str, str], ...] = ()
    slot: tuple[int, int] | None = field(default=None, repr=False)
    """In a worker: the buffer (``dattrain.data.shared_buffer``) and the slot that images and maps lie in."""

    def __len__(self) -> int:
        return len(self.keys)

    def __reduce__(self) -> tuple[Any, ...]:
        # As a classification batch's: small tensors as plain bytes, what lies in a buffer by its place there.
        shape = tuple(self.maps.shape)
        pixels: Any = (self.images, self.maps) if self.slot is None else (*self.slot, shape)
        small = (self.sizes.numpy(), self.weight.cpu().numpy(), self.position.numpy())
        return _rebuild, (pixels, *small, self.keys, self.bad)

    @property
    def device_tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that ``to`` moves."""
        return self.images, self.maps, self.weight

    def pin_memory(self) -> SegmentationBatch:
        """In page-locked memory, from where copies to a GPU do not block (called by torch's pinning thread)."""
        return replace(
            self,
            images=self.images.pin_memory(),
            maps=self.maps.pin_memory(),
            weight=self.weight.pin_memory(),
        )

    def to(self, device: torch.device) -> SegmentationBatch:
        """With images, maps and weight on ``device``; copies from pinned memory do not block."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            maps=self.maps.to(device, non_blocking=True),
            weight=self.weight.to(device, non_blocking=True),
        )


def bytes_of(shape: Shape) -> int:
    """Of images and maps together."""
    return 4 * math.prod(shape)


def empty(
    shape: Shape, among: SharedBatchBuffer | None
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int] | None]:
    """Uninitialised images (B x 3 x H x W), maps (B x H x W), and their slot: see ``shared_buffer.room``."""
    memory, slot = room(among, bytes_of(shape))
    return *_split(memory, shape), slot


def _split(memory: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = 3 * math.prod(shape)
    # Planes, and not channels last as the decoder gives them: that is what the distortion computes on and the network's input is.
    return memory[:pixels].view(shape[0], 3, *shape[1:]), memory[pixels:].view(shape)


def _rebuild(
    pixels: tuple[torch.Tensor, torch.Tensor] | tuple[int, int, Shape],
    sizes: np.ndarray,
    weight: np.ndarray,
    position: np.ndarray,
    keys: list[str],
    bad: tuple[tuple[str, str], ...],
) -> SegmentationBatch:
    if len(pixels) == 3:
        number, slot, shape = pixels
        images, maps = _split(buffer(number).read(slot, bytes_of(shape)), shape)
    else:
        images, maps = pixels
    return SegmentationBatch(
        images, maps, torch.from_numpy(sizes), torch.from_numpy(weight), torch.from_numpy(position), keys, bad
    )
