"""Heads of Faster, Mask and Cascade R-CNN, as mmdet's: proposals, boxes and masks.

``dense_heads/rpn_head.py``, ``roi_heads/bbox_heads/convfc_bbox_head.py`` and ``roi_heads/mask_heads/fcn_mask_head.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dattrain.models.dense.norm import ConvNormReLU, Norm
from dattrain.models.dense.retina import gain_of_256, init_normal


class RPNHead(nn.Module):
    """Objectness and boxes of anchors: a 3 x 3 convolution that every level shares, and two 1 x 1 (Ren et al., NeurIPS 2015)."""

    def __init__(self, *, channels: int = 256, anchors: int = 3) -> None:
        super().__init__()
        self.anchors = anchors
        self.conv = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True))
        self.objectness = nn.Conv2d(channels, anchors, 1)
        self.boxes = nn.Conv2d(channels, anchors * 4, 1)
        init_normal(self, gain_of_256(channels))

    def forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Logits (of a sigmoid) and box deltas of every level's anchors.

        Args:
            levels: B x channels x H_i x W_i each.

        Returns:
            Per level B x anchors x H_i x W_i, and B x (anchors * 4) x H_i x W_i; the anchor is the slower index of both.
        """
        shared = [self.conv(level) for level in levels]
        return [self.objectness(each) for each in shared], [self.boxes(each) for each in shared]


class BoxHead(nn.Module):
    """Class and box of a region: convolutions with norm and without bias, then linear layers, then two that predict.

    Mask R-CNN has no convolutions and two linear layers; Cascade R-CNN here has four and one, in each of its stages.

    Args:
        channels: of a region's map.
        size: sides of that map.
        convs: 3 x 3 convolutions of ``channels``.
        linears: linear layers of ``hidden``.
        norm: of the convolutions.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        channels: int = 256,
        size: int = 7,
        convs: int = 0,
        linears: int = 2,
        hidden: int = 1024,
        norm: Norm = "sync",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.convs = nn.Sequential(*(ConvNormReLU(channels, channels, 3, norm) for _ in range(convs)))
        layers: list[nn.Module] = []
        wide = channels * size**2
        for _ in range(linears):
            linear = nn.Linear(wide, hidden)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU(inplace=True)]
            wide = hidden
        self.linears = nn.Sequential(*layers)
        self.classes = nn.Linear(wide, num_classes + 1)
        self.boxes = nn.Linear(wide, num_classes * 4)
        init_normal(self.classes, 0.01)
        init_normal(self.boxes, 0.001)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (of a softmax) and box deltas, a box for each class.

        Args:
            regions: N x channels x size x size; N may be 0.

        Returns:
            N x (num_classes + 1), the background last, and N x (num_classes * 4), the class the slower index.
        """
        x = self.linears(self.convs(regions).flatten(1))
        return self.classes(x), self.boxes(x)


class MaskHead(nn.Module):
    """A mask of a region for each class: 3 x 3 convolutions, a transposed one that doubles the sides, 1 x 1 (He et al., ICCV 2017)."""

    def __init__(self, num_classes: int, *, channels: int = 256, convs: int = 4) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.convs = nn.Sequential(*(ConvNormReLU(channels, channels, 3, None) for _ in range(convs)))
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.masks = nn.Conv2d(channels, num_classes, 1)
        for module in (self.upsample, self.masks):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, regions: Tensor) -> Tensor:
        """N x channels x S x S -> logits (of a sigmoid), N x num_classes x 2 S x 2 S; N may be 0."""
        masks: Tensor = self.masks(self.relu(self.upsample(self.convs(regions))))
        return masks
