"""One micro-batch, as the engine gets it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from dattrain.data.augment.plan import AugmentPlan
from dattrain.data.shared_buffer import buffer


@dataclass(frozen=True)
class Batch:
    """B samples, and P more images to be mixed into them, where ``augment.mix_group`` reaches beyond the micro-batch.

    Attributes:
        images: B + P x 3 x H x W; uint8 before normalisation, or a float dtype after it. On the device.
        labels: B + P int64, on the device.
        weight: B float32, on the device: 0 for a bad sample, else 1.
        position: B int64 on the CPU: global positions in training, places in the set in evaluation.
        keys: B names, ``shard:key``.
        plan: the drawn augmentation; None in evaluation.
        bad: (key, reason) of the samples that were skipped.
    """

    images: torch.Tensor
    labels: torch.Tensor
    weight: torch.Tensor
    position: torch.Tensor
    keys: list[str]
    plan: AugmentPlan | None = None
    bad: tuple[tuple[str, str], ...] = ()
    slot: tuple[int, int] | None = field(default=None, repr=False)
    """In a worker: the buffer (``dattrain.data.shared_buffer``) and the slot that the images lie in."""

    def __len__(self) -> int:
        return len(self.keys)

    def __reduce__(self) -> tuple[Any, ...]:
        # Between processes each tensor is a file descriptor and a handshake; small ones are cheaper as plain bytes, and
        # images in a buffer are named by their place there.
        images: Any = self.images if self.slot is None else (*self.slot, tuple(self.images.shape))
        small = (self.labels.cpu().numpy(), self.weight.cpu().numpy(), self.position.numpy())
        return _rebuild, (images, *small, self.keys, self.plan, self.bad)

    @property
    def device_tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that ``to`` moves."""
        return self.images, self.labels, self.weight

    def pin_memory(self) -> Batch:
        """In page-locked memory, from where copies to a GPU do not block (called by torch's pinning thread)."""
        return replace(
            self,
            images=self.images.pin_memory(),
            labels=self.labels.pin_memory(),
            weight=self.weight.pin_memory(),
        )

    def to(self, device: torch.device) -> Batch:
        """With images, labels and weight on ``device``; copies from pinned memory do not block."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            weight=self.weight.to(device, non_blocking=True),
        )


def _rebuild(
    images: torch.Tensor | tuple[int, int, tuple[int, int, int, int]],
    labels: np.ndarray,
    weight: np.ndarray,
    position: np.ndarray,
    keys: list[str],
    plan: AugmentPlan | None,
    bad: tuple[tuple[str, str], ...],
) -> Batch:
    if isinstance(images, tuple):
        number, slot, (b, c, h, w) = images
        images = buffer(number).read(slot, b * h * w * c).view(b, h, w, c).permute(0, 3, 1, 2)
    return Batch(
        images,
        torch.from_numpy(labels),
        torch.from_numpy(weight),
        torch.from_numpy(position),
        keys,
        plan,
        bad,
    )
