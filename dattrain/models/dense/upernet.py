"""UperNet (Xiao et al., ECCV 2018), as mmseg's ``decode_heads/uper_head.py``, and its auxiliary ``fcn_head.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dattrain.models.dense.norm import Classifier, ConvNormReLU, Norm

POOLED = (1, 2, 3, 6)
"""Sides of the maps that pyramid pooling averages the coarsest map to."""


class UperNet(nn.Module):
    """Pyramid pooling of the coarsest map, then an FPN with norms, whose levels are all resized to the finest and fused.

    Args:
        in_channels: of the backbone's maps at strides 4, 8, 16, 32.
        channels: of everything inside.
        dropout: share of channels dropped before the classifier.
    """

    def __init__(
        self, in_channels: Sequence[int], num_classes: int, *, channels: int, norm: Norm, dropout: float
    ) -> None:
        super().__init__()
        *finer, coarsest = in_channels
        self.pyramid = nn.ModuleList(
            nn.Sequential(AveragePool(side), ConvNormReLU(coarsest, channels, 1, norm)) for side in POOLED
        )
        self.pooled = ConvNormReLU(coarsest + len(POOLED) * channels, channels, 3, norm)
        self.lateral = nn.ModuleList(ConvNormReLU(each, channels, 1, norm) for each in finer)
        self.output = nn.ModuleList(ConvNormReLU(channels, channels, 3, norm) for _ in finer)
        self.fuse = ConvNormReLU(len(in_channels) * channels, channels, 3, norm)
        self.classifier = Classifier(channels, num_classes, dropout)
        self.num_dropped = self.classifier.num_dropped

    def forward(self, maps: Sequence[Tensor], noise: Tensor | None = None) -> Tensor:
        """Logits of the classes, B x num_classes x H x W of the finest of ``maps``; ``noise`` as ``Classifier`` takes it."""
        coarsest = maps[-1]
        scenes = [_resize(pool(coarsest), coarsest) for pool in self.pyramid]
        merged = [lateral(each) for lateral, each in zip(self.lateral, maps)]
        merged.append(self.pooled(torch.cat([coarsest, *scenes], dim=1)))
        for level in range(len(merged) - 1, 0, -1):
            merged[level - 1] = merged[level - 1] + _resize(merged[level], merged[level - 1])
        levels = [output(each) for output, each in zip(self.output, merged)] + [merged[-1]]
        fused = self.fuse(torch.cat([levels[0], *(_resize(each, levels[0]) for each in levels[1:])], dim=1))
        out: Tensor = self.classifier(fused, noise)
        return out


class AveragePool(nn.Module):
    """``nn.AdaptiveAvgPool2d`` as two products of matrices, since torch's own backward pass has no fixed order of summation on CUDA.

    (It raises under ``torch.use_deterministic_algorithms``.) B x C x H x W to B x C x side x side, in float32 inside.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """Means over ``side`` x ``side`` regions, which overlap where ``side`` does not divide a map's."""
        rows, columns = (self._regions(length, x.device) for length in x.shape[2:])
        # Ones, and the division after them: exact in whatever dtype autocast may take.
        sums = rows @ x.float() @ columns.mT
        return (sums / (rows.sum(1, keepdim=True) * columns.sum(1))).to(x.dtype)

    def _regions(self, length: int, device: torch.device) -> Tensor:
        """``side`` x ``length`` float32: 1 where a place belongs to a region."""
        region = torch.arange(self.side, device=device).unsqueeze(1)
        place = torch.arange(length, device=device)
        first, end = region * length // self.side, -(-(region + 1) * length // self.side)
        return ((place >= first) & (place < end)).float()


class AuxiliaryHead(nn.Module):
    """A 3 x 3 convolution and a classifier on one map, for a second loss in training."""

    def __init__(
        self, in_channels: int, num_classes: int, *, channels: int, norm: Norm, dropout: float
    ) -> None:
        super().__init__()
        self.conv = ConvNormReLU(in_channels, channels, 3, norm)
        self.classifier = Classifier(channels, num_classes, dropout)
        self.num_dropped = self.classifier.num_dropped

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """B x in_channels x H x W -> logits B x num_classes x H x W; ``noise`` as ``Classifier`` takes it."""
        out: Tensor = self.classifier(self.conv(x), noise)
        return out


def _resize(x: Tensor, to: Tensor) -> Tensor:
    """Bilinearly to the height and width of ``to``."""
    return F.interpolate(x, to.shape[2:], mode="bilinear", align_corners=False)
