"""Feature Pyramid Network (Lin et al., CVPR 2017), as mmdet's and mmseg's ``necks/fpn.py`` build it without norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Extra = Literal["none", "pool", "conv"]


class FPN(nn.Module):
    """Maps of one number of channels at every stride: lateral 1 x 1, sum from the top down, 3 x 3; no activations.

    Args:
        in_channels: of the maps, from the finest on.
        channels: of the outputs.
        extra: coarser levels after the last: ``pool`` one, every second pixel of it (Mask R-CNN's P6); ``conv`` two, by 3 x 3
            convolutions of stride 2, the first on the backbone's last map, no activation between (RetinaNet's P6 and P7).
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 256, extra: Extra = "none") -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(each, channels, 1) for each in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        more = (in_channels[-1], channels) if extra == "conv" else ()
        self.extra = nn.ModuleList(nn.Conv2d(each, channels, 3, stride=2) for each in more)
        self.pool = extra == "pool"
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # mmdet's init_cfg: Xavier, uniform
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """B x in_channels[i] x H_i x W_i -> B x channels x H_i x W_i each, then the extra levels, each half the last (rounded up)."""
        merged = [lateral(each) for lateral, each in zip(self.lateral, maps)]
        for level in range(len(merged) - 1, 0, -1):
            finer = merged[level - 1]
            merged[level - 1] = finer + F.interpolate(merged[level], finer.shape[2:], mode="nearest")
        levels = [output(each) for output, each in zip(self.output, merged)]
        if self.pool:
            levels.append(F.max_pool2d(levels[-1], 1, stride=2))
        coarser = maps[-1]
        for conv in self.extra:
            # Padded beforehand: of a map of one column oneDNN's bf16 convolution of stride 2 that pads by itself leaves a part of
            # its weight's gradient as memory was (torch 2.14 on CPUs).
            coarser = conv(F.pad(coarser, (1, 1, 1, 1)))
            levels.append(coarser)
        return levels
