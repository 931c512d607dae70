"""Which regions the heads of an R-CNN are trained on, their losses, and how a cascade moves them.

mmdet's ``roi_heads/standard_roi_head.py``, ``cascade_roi_head.py``, ``bbox_heads/bbox_head.py`` and
``mask_heads/fcn_mask_head.py``. All box tensors are fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from dattrain.models.dense.boxes import decode, encode
from dattrain.models.dense.detector import Target
from dattrain.models.dense.mask_targets import mask_targets
from dattrain.models.dense.matching import match
from dattrain.models.dense.sampling import sample

POSITIVE_SHARE = 0.25
GIOU_WEIGHT = 10.0


@dataclass(frozen=True)
class Stage:
    """How a box head is trained.

    Attributes:
        iou: from which on a region is of the box that it overlaps most.
        low_quality: whether a box's best regions, of ``iou`` or more, are its own even where they overlap another more.
        stds: by which deltas are divided.
        weight: of its losses.
        giou: whether the boxes' loss is the generalised IoU of decoded boxes (Rezatofighi et al., CVPR 2019), not L1 of deltas.
        prefix: of its losses' names.
    """

    iou: float = 0.5
    low_quality: bool = False
    stds: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2)
    weight: float = 1.0
    giou: bool = False
    prefix: str = ""


CASCADE = (
    Stage(0.5, giou=True, prefix="s0_"),
    Stage(0.6, stds=(0.05, 0.05, 0.1, 0.1), weight=0.5, giou=True, prefix="s1_"),
    Stage(0.7, stds=(0.033, 0.033, 0.067, 0.067), weight=0.25, giou=True, prefix="s2_"),
)
"""Cascade R-CNN (Cai and Vasconcelos, CVPR 2018), with the boxes' loss of Swin's and DAT's files."""


@dataclass(frozen=True)
class Regions:
    """N regions of a micro-batch that are trained on.

    Attributes:
        boxes: N x 5 fp32: number of the image, then x1, y1, x2, y2 in pixels.
        labels: N int64; the number of classes for the background.
        objects: N int64: number among the boxes of all images in order; -1 for the background.
        truths: N bool: whether a region is itself one of those boxes.
    """

    boxes: Tensor
    labels: Tensor
    objects: Tensor
    truths: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def pick(
    proposals: Sequence[Tensor],
    targets: Sequence[Target | None],
    keys: Tensor,
    stage: Stage,
    num_classes: int,
    samples: int = 512,
) -> Regions:
    """So many regions of each image, at most a quarter of them of objects, whose own boxes are among the proposals.

    Args:
        proposals: M x 4 of each image.
        targets: ``boxes`` and ``labels`` of each image, or None for one that has no part.
        keys: B int64, see ``sampling.key_of``.
    """
    device = keys.device
    parts = [
        (
            torch.zeros(0, 5, device=device),
            torch.zeros(0, dtype=torch.int64, device=device),
            torch.zeros(0, dtype=torch.int64, device=device),
            torch.zeros(0, dtype=torch.bool, device=device),
        )
    ]
    before = 0
    for image, (proposed, target) in enumerate(zip(proposals, targets)):
        if target is None:
            continue
        boxes, labels = target["boxes"], target["labels"]
        number = len(boxes)
        matched = match(
            proposed,
            boxes,
            positive=stage.iou,
            negative=stage.iou,
            minimum=stage.iou,
            low_quality=stage.low_quality,
        )
        candidates = torch.cat([boxes, proposed])
        matched = torch.cat([torch.arange(number, device=device), matched])
        positive, negative = sample(matched, keys[image], total=samples, positive_share=POSITIVE_SHARE)
        chosen = torch.cat([positive, negative])
        backgrounds = torch.full_like(negative, num_classes)
        parts.append(
            (
                F.pad(candidates[chosen], (1, 0), value=image),
                torch.cat([labels[matched[positive]], backgrounds]),
                torch.cat([matched[positive] + before, torch.full_like(negative, -1)]),
                chosen < number,
            )
        )
        before += number
    return Regions(*(torch.cat(each) for each in zip(*parts)))


def box_losses(
    logits: Tensor, deltas: Tensor, regions: Regions, boxes: Tensor, stage: Stage
) -> dict[str, Tensor]:
    """Cross-entropy over the classes and the background, and the loss of the boxes of those that are of an object.

    Both are divided by the number of regions.

    Args:
        logits: N x (K + 1).
        deltas: N x (K * 4); those of a region's own class are trained.
        boxes: n x 4, of all images in order.
    """
    count = max(len(regions), 1)
    loss_cls = F.cross_entropy(logits, regions.labels, reduction="sum") / count
    positive = (regions.objects >= 0).nonzero()[:, 0]
    own = deltas.unflatten(1, (-1, 4))[positive, regions.labels[positive]]
    reference, truth = regions.boxes[positive, 1:], boxes[regions.objects[positive]]
    if stage.giou:
        found = decode(reference, own, stage.stds)
        loss_bbox = GIOU_WEIGHT * generalized_box_iou_loss(found, truth, reduction="sum")
    else:
        loss_bbox = (own - encode(reference, truth, stage.stds)).abs().sum()
    return {"loss_cls": loss_cls * stage.weight, "loss_bbox": loss_bbox / count * stage.weight}


def mask_loss(logits: Tensor, regions: Regions, boxes: Tensor, masks: Tensor) -> Tensor:
    """Mean binary cross-entropy over the cells of the masks of regions of an object; 0 where there are none.

    Args:
        logits: P x S x S, of the classes of the P regions that are of an object.
        boxes: n x 4, of all images in order.
        masks: n x G x G uint8, see ``mask_targets.mask_targets``.
    """
    positive = (regions.objects >= 0).nonzero()[:, 0]
    objects, references = regions.objects[positive], regions.boxes[positive, 1:]
    truth = mask_targets(masks, boxes, objects, references, logits.shape[-1])
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / max(logits.numel(), 1)


@torch.no_grad()
def refine(
    boxes: Tensor, labels: Tensor, deltas: Tensor, stds: Sequence[float], sizes: Sequence[tuple[int, int]]
) -> Tensor:
    """Regions moved by the deltas of a class each, clipped to their image.

    Args:
        boxes: N x 5, the first column the number of the image.
        labels: N int64, below K.
        deltas: N x (K * 4).
        sizes: height and width of each image.

    Returns:
        N x 5.
    """
    own = deltas.unflatten(1, (-1, 4))[torch.arange(len(labels), device=labels.device), labels]
    moved = decode(boxes[:, 1:], own, stds)
    limits = boxes.new_tensor([[width, height, width, height] for height, width in sizes])
    moved = torch.minimum(moved.clamp(min=0), limits[boxes[:, 0].long()])
    return torch.cat([boxes[:, :1], moved], 1)
