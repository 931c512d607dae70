"""Normalisation, random erasing, mixup and cutmix on the device, and the soft targets, as the plan says.

All is elementwise or a scatter to distinct places, and the noise is a hash of the plan's keys: equal plans give equal
batches on any number of ranks.
"""

from __future__ import annotations

import numpy as np
import torch

from dattrain.config.data_sections import Augment
from dattrain.data.augment.plan import AugmentPlan
from dattrain.data.batch import Batch
from dattrain.data.to_device import to_device

_MASK = 0xFFFFFFFF


class MixupCutmix:
    """Turns a batch into network input and soft targets.

    Args:
        augment: normalisation and label smoothing; what is erased and mixed stands in the batch's plan.
        num_classes: of the head.
    """

    def __init__(self, augment: Augment, num_classes: int) -> None:
        self.num_classes = num_classes
        self.smoothing = augment.label_smoothing
        self._normalize = Normalize(augment)

    def __call__(
        self, batch: Batch, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images (B x 3 x H x W, ``dtype``), targets (B x num_classes, float32, rows sum to 1), weight (B, float32).

        A batch without plan is normalised alone.
        """
        images = self._normalize(batch.images)
        targets = self.targets(batch.labels)
        if batch.plan is not None:
            images = erase(images, batch.plan)
            images, targets = mix(images, targets, batch.plan)
        return images.to(dtype), targets, batch.weight

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        """Smoothed one-hot targets (Szegedy et al. 2016): B x num_classes float32."""
        off = self.smoothing / self.num_classes
        targets = torch.full((len(labels), self.num_classes), off, device=labels.device)
        return targets.scatter_(1, labels[:, None], 1.0 - self.smoothing + off)


class Normalize:
    """uint8 images to zero mean and unit deviation, B x 3 x H x W float32 contiguous.

    Float images pass, already normalised by their decoder.
    """

    def __init__(self, augment: Augment) -> None:
        mean, std = torch.tensor(augment.mean), torch.tensor(augment.std)
        self._scale = (1.0 / (255.0 * std)).view(3, 1, 1)
        self._shift = (-mean / std).view(3, 1, 1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise a batch; a new tensor."""
        if images.dtype != torch.uint8:
            return images.to(torch.float32, memory_format=torch.contiguous_format)
        if self._scale.device != images.device:
            self._scale, self._shift = (to_device(x, images.device) for x in (self._scale, self._shift))
        floats = images.to(torch.float32, memory_format=torch.contiguous_format)
        return floats.mul_(self._scale).add_(self._shift)


def erase(images: torch.Tensor, plan: AugmentPlan) -> torch.Tensor:
    """Fill the planned boxes of ``images`` (B x 3 x H x W float32, contiguous) with noise or zeros, in place.

    Zhong et al., "Random Erasing" (2020), on normalised images, as timm does it.
    """
    hit = np.flatnonzero(plan.erase[:, 2])
    if not len(hit):
        return images
    device, (_, channels, height, width) = images.device, images.shape
    boxes = plan.erase[hit].astype(np.int64)
    counts = channels * boxes[:, 2] * boxes[:, 3]
    total = int(counts.sum())
    table = np.column_stack((hit, boxes, np.cumsum(counts) - counts, plan.erase_key[hit], counts))
    columns = to_device(table, device)
    # One row of the table for each pixel that is erased, in all boxes of the batch at once.
    sample, top, left, h, w, start, key = (
        columns[:, :7].repeat_interleave(columns[:, 7], 0, output_size=total).T
    )
    within = torch.arange(total, device=device) - start
    row, column = within // w % h + top, within % w + left
    at = ((sample * channels + within // (h * w)) * height + row) * width + column
    value = hashed_normal(key, within) if plan.erase_noise else torch.zeros(total, device=device)
    images.view(-1)[at] = value.to(images.dtype)
    return images


def mix(images: torch.Tensor, targets: torch.Tensor, plan: AugmentPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each of the first N images and targets with its partner as the plan says; the rows behind them fall away."""
    count = len(plan.mix)
    if ((plan.mix == 1) & (plan.mix_box[:, 2] == 0)).all():
        return images[:count], targets[:count]
    device, (_, _, height, width) = images.device, images.shape
    partner, lam = to_device(plan.mix_partner, device), to_device(plan.mix, device)
    top, left, h, w = to_device(plan.mix_box.astype(np.int64), device).T[:, :, None, None]
    y = torch.arange(height, device=device)[None, :, None]
    x = torch.arange(width, device=device)[None, None, :]
    outside = ~((y >= top) & (y < top + h) & (x >= left) & (x < left + w))
    own = torch.where(h > 0, outside.to(images.dtype), lam[:, None, None])[:, None]
    mixed = images[:count] * own + images.index_select(0, partner) * (1 - own)
    lam = lam[:, None]
    return mixed, targets[:count] * lam + targets.index_select(0, partner) * (1 - lam)


def hashed_normal(key: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """Standard normal noise, float32, as a function of (key, counter), both int64 below 2**32 of one shape."""
    base = _hash(key ^ 0x9E3779B9)
    u, v = (((_hash(_hash(2 * counter + i) ^ base)).to(torch.float32) + 0.5) * 2.0**-32 for i in (0, 1))
    return torch.sqrt(-2.0 * torch.log(u)) * torch.cos(2.0 * torch.pi * v)


def _hash(x: torch.Tensor) -> torch.Tensor:
    """A 32-bit mixer of low bias (Ellis and Wellons, "hash-prospector", 2018), in int64 arithmetic."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
