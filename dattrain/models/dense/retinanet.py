"""RetinaNet (Lin et al., ICCV 2017) as mmdet's ``retinanet_r50_fpn.py`` and its ``dense_heads/retina_head.py`` make it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms

from dattrain.models.blocks import recompute
from dattrain.models.dense.anchors import Anchors
from dattrain.models.dense.backbone import Backbone
from dattrain.models.dense.boxes import decode, encode
from dattrain.models.dense.detector import Detector, Sizes, Target, by_anchor, shapes_of
from dattrain.models.dense.fpn import FPN
from dattrain.models.dense.matching import IGNORED, match
from dattrain.models.dense.retina import RetinaHead

STDS = (1.0, 1.0, 1.0, 1.0)
POSITIVE, BACKGROUND = 0.5, 0.4
ALPHA, GAMMA = 0.25, 2.0
PER_LEVEL = 1000
"""Pairs of anchor and class that are looked at, of each level."""
NMS = 0.5


class RetinaNet(Detector):
    """A pyramid from P3 to P7, two towers, focal loss.

    Args:
        backbone: of three maps, strides 8 to 32.
        channels: of pyramid and towers.

    Raises:
        ValueError: a backbone of other maps.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        channels: int = 256,
        score_threshold: float = 0.05,
        max_detections: int = 100,
    ) -> None:
        if len(backbone.channels) != 3:
            raise ValueError(f"RetinaNet takes the backbone's last three maps, not {len(backbone.channels)}")
        neck = FPN(backbone.channels, channels, extra="conv")
        super().__init__(
            backbone, neck, num_classes, score_threshold=score_threshold, max_detections=max_detections
        )
        self.anchors = Anchors(
            [4 * 2 ** (third / 3) for third in range(3)], (0.5, 1.0, 2.0), (8, 16, 32, 64, 128)
        )
        self.head = RetinaHead(num_classes, channels=channels, anchors=self.anchors.per_place)

    def losses(
        self, levels: list[Tensor], sizes: Sizes, targets: Sequence[Target | None], samples: Tensor
    ) -> dict[str, Tensor]:
        """``loss_cls``, focal, and ``loss_bbox``, L1 of the deltas: sums, divided by the positives of all images (1 at least of each).

        Shapes are those of images and anchors alone, and nothing is synchronised with the device.
        """
        logits, deltas = self.head(levels)
        shapes, device = shapes_of(levels), levels[0].device
        of_levels = self.anchors(shapes, device)
        anchors = torch.cat(of_levels)
        each_image = [self._assigned(anchors, shapes, size, one) for size, one in zip(sizes, targets)]
        matched, labels, boxes = (torch.stack(parts) for parts in zip(*each_image))
        counts = [len(each) for each in of_levels]
        # The largest tensors of a step: level by level, and computed anew in the backward pass.
        parts = zip(logits, matched.split(counts, 1), labels.split(counts, 1), strict=True)
        loss_cls = torch.stack([recompute(focal_loss, *each) for each in parts]).sum()
        found = torch.cat(by_anchor(deltas, 4), 1)
        distance = (found - encode(anchors.expand_as(found), boxes, STDS)).abs()
        positive = matched >= 0
        loss_bbox = torch.where(positive.unsqueeze(2), distance, 0).sum()
        per_image = positive.sum(1).clamp(min=1)
        counted = [count for count, one in zip(per_image, targets) if one is not None]
        positives = torch.stack(counted).sum() if counted else per_image.new_ones(())
        return {"loss_cls": loss_cls / positives, "loss_bbox": loss_bbox / positives}

    def _assigned(
        self, anchors: Tensor, shapes: list[tuple[int, int]], size: tuple[int, int], target: Target | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of each anchor in an image its match (``matching.match``), and the label and the box of that; some box where it has none."""
        if target is None:
            nowhere = torch.full((len(anchors),), IGNORED, dtype=torch.int64, device=anchors.device)
            return nowhere, torch.zeros_like(nowhere), anchors
        boxes = target["boxes"].float()
        inside = self.anchors.valid(shapes, size, anchors.device)
        # Those over padding, which have no part, cannot take a box from the others: larger than their distance to the edge,
        # they overlap no box of the image more than their neighbours over it do.
        matched = match(anchors, boxes, positive=POSITIVE, negative=BACKGROUND, minimum=0.0, low_quality=True)
        index = matched.clamp(min=0)
        # One more of each, for images without objects.
        labels, boxes = F.pad(target["labels"], (0, 1))[index], F.pad(boxes, (0, 0, 0, 1))[index]
        return torch.where(inside, matched, IGNORED), labels, boxes

    def detect(self, levels: list[Tensor], sizes: Sizes) -> list[dict[str, Tensor]]:
        """Of each level the best pairs of anchor and class, then non-maximum suppression within each class."""
        logits, deltas = self.head(levels)
        scores = [each.sigmoid() for each in by_anchor(logits, self.num_classes)]
        shifts, anchors = by_anchor(deltas, 4), self.anchors(shapes_of(levels), levels[0].device)
        return [
            self._objects([each[image] for each in scores], [each[image] for each in shifts], anchors, size)
            for image, size in enumerate(sizes)
        ]

    def _objects(
        self, scores: list[Tensor], shifts: list[Tensor], anchors: list[Tensor], size: tuple[int, int]
    ) -> dict[str, Tensor]:
        boxes, best, labels = [], [], []
        for score, shift, reference in zip(scores, shifts, anchors):
            (pairs,) = (score.flatten() > self.score_threshold).nonzero(as_tuple=True)
            # Stable, so that equal ones come in one order on every device.
            value, order = score.flatten()[pairs].sort(descending=True, stable=True)
            pairs = pairs[order[:PER_LEVEL]]
            anchor = pairs // self.num_classes
            boxes.append(decode(reference[anchor], shift[anchor], STDS, size))
            best.append(value[:PER_LEVEL])
            labels.append(pairs % self.num_classes)
        box, value, label = torch.cat(boxes), torch.cat(best), torch.cat(labels)
        there = (box[:, 2:] > box[:, :2]).all(1)  # what is outside of the image is clipped to nothing
        box, value, label = box[there], value[there], label[there]
        kept = batched_nms(box, value, label, NMS)[: self.max_detections]
        return {"boxes": box[kept], "scores": value[kept], "labels": label[kept]}

    def forward_dummy(self, x: Tensor) -> object:
        """Logits and deltas of every level."""
        return self.head(self.neck(self.backbone(x)))


def focal_loss(logits: Tensor, matched: Tensor, labels: Tensor) -> Tensor:
    """Sum of the sigmoid focal loss over the anchors and classes of a level (equation 5 of the paper): scalar fp32.

    Args:
        logits: B x (anchors * K) x H x W, any float dtype.
        matched: B x (H * W * anchors) int64 as ``matching.match`` gives them.
        labels: B x (H * W * anchors) int64 in [0, K); read where ``matched`` is 0 or more.
    """
    batch, _, height, width = logits.shape
    places = (batch, height, width, matched.shape[1] // (height * width))
    matched, labels = (each.view(places).permute(0, 3, 1, 2) for each in (matched, labels))
    x = logits.float().unflatten(1, (places[3], -1))
    # As if all were background, as nearly all are; then the difference where an anchor's own class is there.
    background = (_focal(-x, 1 - ALPHA).sum(2) * (matched != IGNORED)).sum()
    own = x.gather(2, labels.unsqueeze(2)).squeeze(2)
    difference = _focal(own, ALPHA) - _focal(-own, 1 - ALPHA)
    return background + torch.where(matched >= 0, difference, 0).sum()


def _focal(x: Tensor, weight: float) -> Tensor:
    """Of logits of a class that is there; the logits of one that is not are to be negated."""
    return weight * (-x).sigmoid() ** GAMMA * F.softplus(-x)
