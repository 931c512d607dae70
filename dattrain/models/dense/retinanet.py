"""RetinaNet (Lin et al., ICCV 2017) as mmdet's ``retinanet_r50_fpn.py`` and its ``dense_heads/retina_head.py`` make it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms, sigmoid_focal_loss

from dattrain.models.blocks import recompute
from dattrain.models.dense.anchors import Anchors
from dattrain.models.dense.backbone import Backbone
from dattrain.models.dense.boxes import decode, encode
from dattrain.models.dense.detector import Detector, Sizes, Target, by_anchor, shapes_of
from dattrain.models.dense.fpn import FPN
from dattrain.models.dense.matching import NEGATIVE, match
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
        """``loss_cls``, focal, and ``loss_bbox``, L1 of the deltas: sums, divided by the positives of all images (1 at least)."""
        logits, deltas = self._outputs(levels)
        shapes, device = shapes_of(levels), levels[0].device
        with torch.autocast(device.type, enabled=False):
            anchors = torch.cat(self.anchors(shapes, device))
            # Empty sums: a micro-batch of nothing has losses with gradients too.
            loss_cls, loss_bbox, positives = logits[:, :0].sum(), deltas[:, :0].sum(), 0
            for image, target in enumerate(targets):
                if target is None:
                    continue
                boxes = target["boxes"].float()
                matched = match(
                    anchors, boxes, positive=POSITIVE, negative=BACKGROUND, minimum=0.0, low_quality=True
                )
                inside = self.anchors.valid(shapes, sizes[image], device)
                (taken,) = ((matched >= NEGATIVE) & inside).nonzero(as_tuple=True)
                (positive,) = ((matched >= 0) & inside).nonzero(as_tuple=True)
                labels = torch.full_like(matched, self.num_classes)
                labels[positive] = target["labels"][matched[positive]]
                loss_cls = loss_cls + recompute(_focal, logits[image][taken], labels[taken])
                wanted = encode(anchors[positive], boxes[matched[positive]], STDS)
                loss_bbox = loss_bbox + (deltas[image][positive] - wanted).abs().sum()
                positives += len(positive)
            return {"loss_cls": loss_cls / max(positives, 1), "loss_bbox": loss_bbox / max(positives, 1)}

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
        kept = batched_nms(box, value, label, NMS)[: self.max_detections]
        return {"boxes": box[kept], "scores": value[kept], "labels": label[kept]}

    def forward_dummy(self, x: Tensor) -> object:
        """Logits and deltas of every level."""
        return self.head(self.neck(self.backbone(x)))

    def _outputs(self, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits B x N x num_classes and deltas B x N x 4 of all anchors, fp32."""
        logits, deltas = self.head(levels)
        return torch.cat(by_anchor(logits, self.num_classes), 1), torch.cat(by_anchor(deltas, 4), 1)


def _focal(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the focal loss of N x K logits; a label of K is the background."""
    truth = F.one_hot(labels, logits.shape[1] + 1)[:, :-1].to(logits.dtype)
    loss: Tensor = sigmoid_focal_loss(logits, truth, ALPHA, GAMMA, reduction="sum")
    return loss
