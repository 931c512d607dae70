"""Semantic FPN: the semantic branch of Panoptic FPN (Kirillov et al., CVPR 2019), as mmseg's ``decode_heads/fpn_head.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dattrain.models.dense.fpn import FPN
from dattrain.models.dense.norm import Classifier, ConvNormReLU, Norm


class SemanticFPN(nn.Module):
    """An FPN whose levels are convolved and doubled up to the finest, then summed and classified.

    Args:
        in_channels: of the backbone's maps at strides 4, 8, 16, 32.
        channels: of the pyramid; half of it after.
        dropout: share of channels dropped before the classifier.
    """

    def __init__(
        self, in_channels: Sequence[int], num_classes: int, *, channels: int, norm: Norm, dropout: float
    ) -> None:
        super().__init__()
        half = max(1, channels // 2)
        self.neck = FPN(in_channels, channels)
        self.levels = nn.ModuleList(
            nn.ModuleList(
                ConvNormReLU(half if each else channels, half, 3, norm) for each in range(max(1, level))
            )
            for level in range(len(in_channels))
        )
        self.classifier = Classifier(half, num_classes, dropout)
        self.num_dropped = self.classifier.num_dropped

    def forward(self, maps: Sequence[Tensor], noise: Tensor | None = None) -> Tensor:
        """Logits of the classes, B x num_classes x H x W of the finest of ``maps``; ``noise`` as ``Classifier`` takes it."""
        levels = self.neck(maps)
        total = None
        for index, (convs, x) in enumerate(zip(self.levels, levels)):
            for conv in convs:  # type: ignore[attr-defined]
                x = conv(x)
                if index:
                    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            if total is None:
                total = x
            else:  # doubling a side that was rounded up is a pixel too much
                total = total + F.interpolate(x, total.shape[2:], mode="bilinear", align_corners=False)
        out: Tensor = self.classifier(total, noise)
        return out
