"""RetinaNet's head (Lin et al., ICCV 2017), as mmdet's ``dense_heads/retina_head.py``."""

from __future__ import annotations

from collections.abc import Sequence
from math import log, sqrt

from torch import Tensor, nn

PRIOR = 0.01
"""The score that every anchor begins with, of any class: most anchors are of none."""


class RetinaHead(nn.Module):
    """Two towers of 3 x 3 convolutions that every level shares, for the classes and the boxes of its anchors.

    Args:
        channels: of the levels, and of the towers.
        anchors: at every place of a level.
        convs: of each tower, before the one that predicts.
    """

    def __init__(self, num_classes: int, *, channels: int = 256, anchors: int = 9, convs: int = 4) -> None:
        super().__init__()
        self.num_classes, self.anchors = num_classes, anchors
        self.class_tower = _tower(channels, convs)
        self.box_tower = _tower(channels, convs)
        self.classes = nn.Conv2d(channels, anchors * num_classes, 3, padding=1)
        self.boxes = nn.Conv2d(channels, anchors * 4, 3, padding=1)
        init_normal(self, gain_of_256(channels))
        nn.init.constant_(self.classes.bias, -log((1 - PRIOR) / PRIOR))  # type: ignore[arg-type]

    def forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Logits (of a sigmoid) and box deltas of every level's anchors.

        Args:
            levels: B x channels x H_i x W_i each.

        Returns:
            Per level B x (anchors * num_classes) x H_i x W_i, and B x (anchors * 4) x H_i x W_i; the anchor is the slower
            index of both.
        """
        logits = [self.classes(self.class_tower(level)) for level in levels]
        return logits, [self.boxes(self.box_tower(level)) for level in levels]


def gain_of_256(channels: int) -> float:
    """Standard deviation of a 3 x 3 convolution's weights that keeps what mmdet's .01 does with the scale of 256 channels.

    In towers of 64 channels .01 shrinks what goes through by another factor of 16, and a short training goes by before they have grown.
    """
    return 0.01 * sqrt(256 / channels)


def _tower(channels: int, convs: int) -> nn.Sequential:
    layers = [
        layer
        for _ in range(convs)
        for layer in (nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True))
    ]
    return nn.Sequential(*layers)


def init_normal(module: nn.Module, std: float) -> None:
    """Draw every convolution and linear layer of ``module`` from a normal of ``std``; biases are 0."""
    for child in module.modules():
        if isinstance(child, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(child.weight, std=std)
            nn.init.zeros_(child.bias)  # type: ignore[arg-type]
