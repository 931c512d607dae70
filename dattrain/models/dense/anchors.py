"""Boxes laid over the places of maps at several strides, as mmdet's ``anchor_generator.py`` lays them.

An anchor's centre is at the upper left pixel of its place's square, and its sides are not rounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Shapes = Sequence[tuple[int, int]]
"""Height and width of each level's map."""


class Anchors:
    """Anchors of all ratios and scales at every place.

    Args:
        scales: sides of an anchor of ratio 1, in strides.
        ratios: of height to width.
        strides: of the levels, in pixels.
    """

    def __init__(self, scales: Sequence[float], ratios: Sequence[float], strides: Sequence[int]) -> None:
        self.scales, self.ratios, self.strides = tuple(scales), tuple(ratios), tuple(strides)

    @property
    def per_place(self) -> int:
        """How many there are at a place."""
        return len(self.scales) * len(self.ratios)

    def __call__(self, shapes: Shapes, device: torch.device) -> list[Tensor]:
        """(H_i * W_i * per_place) x 4 fp32 of each level, in the order row, column, ratio, scale."""
        found = []
        for (height, width), stride in zip(shapes, self.strides, strict=True):
            ratios = torch.tensor(self.ratios, dtype=torch.float32, device=device).sqrt()
            scales = torch.tensor(self.scales, dtype=torch.float32, device=device) * stride
            sides = [(factor[:, None] * scales).flatten() for factor in (1 / ratios, ratios)]
            half = torch.stack(sides, -1) / 2
            y, x = (
                torch.arange(side, dtype=torch.float32, device=device) * stride for side in (height, width)
            )
            rows, columns = torch.meshgrid(y, x, indexing="ij")
            middle = torch.stack([columns, rows], -1)[:, :, None]
            found.append(torch.cat([middle - half, middle + half], -1).reshape(-1, 4))
        return found

    def valid(self, shapes: Shapes, size: tuple[int, int], device: torch.device) -> Tensor:
        """Which anchors of all levels, one after the other, take part in training on an image of ``size`` (height, width).

        Those of places over the image, with its sides rounded up to 32 (mmdet's ``valid_flags`` of its ``pad_shape``): the others
        lie over what a larger image of the micro-batch made necessary. N bool.
        """
        rounded = [-(-side // 32) * 32 for side in size]
        flags = []
        for shape, stride in zip(shapes, self.strides, strict=True):
            rows, columns = (
                torch.arange(side, device=device) < -(-full // stride) for side, full in zip(shape, rounded)
            )
            flags.append((rows[:, None] & columns).flatten().repeat_interleave(self.per_place))
        return torch.cat(flags)
