"""Maps of one size for regions of any: mmdet's ``SingleRoIExtractor`` on torchvision's RoIAlign."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

FINEST_SCALE = 56
"""Regions whose sides have a geometric mean below twice this many pixels are taken from the finest level."""


def levels_of(boxes: Tensor, levels: int) -> Tensor:
    """The level of a pyramid that a region is taken from (Lin et al., CVPR 2017, eq. 1): N x 4 fp32 -> N int64 in [0, levels)."""
    width, height = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).unbind(1)
    return torch.log2((width * height).sqrt() / FINEST_SCALE + 1e-6).floor().clamp(0, levels - 1).long()


def roi_pool(levels: Sequence[Tensor], strides: Sequence[int], regions: Tensor, size: int) -> Tensor:
    """RoIAlign (He et al., ICCV 2017) without the half-pixel shift of its first version, one sample for each pixel of the map.

    Args:
        levels: B x C x H_i x W_i fp32 each, the finest first.
        strides: pixels of the image to one of each level.
        regions: N x 5 fp32: number of the image, then x1, y1, x2, y2 in pixels; N may be 0. What is not finite, as after an
            update that diverged, counts as 0.

    Returns:
        N x C x size x size fp32; zeros for a region without area.
    """
    # Not finite sides would be turned into any number of samples.
    regions = regions.nan_to_num()
    level = levels_of(regions[:, 1:], len(levels))
    order = level.argsort(stable=True)
    pooled = [
        roi_align(features, regions[level == number], size, 1 / stride, sampling_ratio=0, aligned=True)
        for number, (features, stride) in enumerate(zip(levels, strides))
    ]
    return torch.cat(pooled).index_select(0, order.argsort())
