"""Faster, Mask and Cascade R-CNN (Ren et al., NeurIPS 2015; He et al., ICCV 2017; Cai and Vasconcelos, CVPR 2018) as mmdet makes them.

``configs/_base_/models/{faster,mask,cascade_mask}_rcnn_r50_fpn.py``; Cascade R-CNN with the box heads of Swin's and DAT's files.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from dattrain.models.dense.anchors import Anchors
from dattrain.models.dense.backbone import Backbone
from dattrain.models.dense.boxes import decode
from dattrain.models.dense.detector import Detector, Sizes, Target, by_anchor, shapes_of
from dattrain.models.dense.fpn import FPN
from dattrain.models.dense.norm import Norm, statistics_kept
from dattrain.models.dense.rcnn import BoxHead, MaskHead, RPNHead
from dattrain.models.dense.regions import (
    CASCADE,
    POSITIVE_SHARE,
    Stage,
    box_losses,
    mask_loss,
    pick,
    refine,
)
from dattrain.models.dense.roi_pool import roi_pool
from dattrain.models.dense.rpn import inside_of, propose, rpn_losses
from dattrain.models.dense.sampling import key_of

STRIDES = (4, 8, 16, 32, 64)
ANCHORS_IN_TRAINING = 2000
"""Looked at on each level."""
NMS = 0.5
BOX_SIZE, MASK_SIZE = 7, 14
"""Sides of a region's map."""


class FasterRCNN(Detector):
    """A pyramid from P2 to P6, proposals, then a class and a box for each, and perhaps a mask; a cascade does that three times.

    Args:
        backbone: of four maps, strides 4 to 32.
        cascade: three stages, each with box head and mask head of its own.
        masks: whether there are mask heads.
        norm: of the convolutions that box heads of a cascade have.
        channels: of pyramid and heads; linear layers have four times as many.
        region_samples: regions of an image that box and mask heads are trained on.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        cascade: bool = False,
        masks: bool = True,
        norm: Norm = "sync",
        channels: int = 256,
        region_samples: int = 512,
        score_threshold: float = 0.05,
        max_detections: int = 100,
    ) -> None:
        # mmdet's files differ in this: Mask R-CNN's matches boxes' best regions, Faster R-CNN's does not.
        self.stages = CASCADE if cascade else (Stage(low_quality=masks),)
        self.samplers = 1 + len(self.stages)
        self.has_masks = masks
        super().__init__(
            backbone,
            FPN(backbone.channels, channels, "pool"),
            num_classes,
            score_threshold=score_threshold,
            max_detections=max_detections,
        )
        self.cascade = cascade
        self.region_samples = region_samples
        self.anchors = Anchors((8.0,), (0.5, 1.0, 2.0), STRIDES)
        self.rpn = RPNHead(channels=channels, anchors=self.anchors.per_place)
        layers = {"convs": 4, "linears": 1} if cascade else {"convs": 0, "linears": 2}
        self.box_heads = nn.ModuleList(
            BoxHead(num_classes, channels=channels, size=BOX_SIZE, hidden=4 * channels, norm=norm, **layers)
            for _ in self.stages
        )
        self.mask_heads = nn.ModuleList(
            MaskHead(num_classes, channels=channels) for _ in (self.stages if masks else ())
        )

    def losses(
        self, levels: list[Tensor], sizes: Sizes, targets: Sequence[Target | None], samples: Tensor
    ) -> dict[str, Tensor]:
        """``loss_rpn_cls``, ``loss_rpn_bbox``, ``loss_cls``, ``loss_bbox`` and ``loss_mask``; the last three of a cascade's stages as ``s0_loss_cls``, ..."""
        keys = key_of(samples)
        logits, deltas, anchors = self._anchors(levels)
        shapes, flat = shapes_of(levels), torch.cat(anchors)
        inside = [self.anchors.valid(shapes, size, flat.device) for size in sizes]
        if self.cascade:
            inside = [valid & inside_of(flat, size) for valid, size in zip(inside, sizes)]
        losses = dict(
            zip(
                ("loss_rpn_cls", "loss_rpn_bbox"),
                rpn_losses(
                    torch.cat(logits, 1),
                    torch.cat(deltas, 1),
                    flat,
                    inside,
                    [None if target is None else target["boxes"] for target in targets],
                    keys[:, 0],
                    beta=1 / 9 if self.cascade else 0.0,
                ),
            )
        )
        limits = {"per_level": ANCHORS_IN_TRAINING, "total": 2000 if self.cascade else 1000}
        proposals = self._proposals(logits, deltas, anchors, sizes, **limits)

        maps = _maps(levels)
        there = [target for target in targets if target is not None]
        boxes = torch.cat([flat[:0], *(target["boxes"] for target in there)])
        for number, stage in enumerate(self.stages):
            regions = pick(
                proposals, targets, keys[:, 1 + number], stage, self.num_classes, self.region_samples
            )
            scores, shifts = self._boxes(number, maps, regions.boxes, sizes)
            of_stage = box_losses(scores, shifts, regions, boxes, stage)
            if self.has_masks:
                positive = regions.objects >= 0
                found = self._masks(number, maps, regions.boxes[positive], regions.labels[positive], sizes)
                masks = torch.cat([target["masks"] for target in there]) if there else found[:0]
                of_stage["loss_mask"] = mask_loss(found, regions, boxes, masks) * stage.weight
            losses |= {stage.prefix + name: value for name, value in of_stage.items()}
            if number + 1 < len(self.stages):
                best = scores[:, :-1].argmax(1)
                labels = torch.where(regions.labels == self.num_classes, best, regions.labels)
                moved = refine(regions.boxes, labels, shifts, stage.stds, sizes)[~regions.truths]
                proposals = [moved[moved[:, 0] == image, 1:] for image in range(len(sizes))]
        return losses

    def detect(self, levels: list[Tensor], sizes: Sizes) -> list[dict[str, Tensor]]:
        """Proposals, their classes and boxes, suppression within a class, and masks of what is left.

        A cascade averages its stages' logits, and the probabilities of its masks.
        """
        logits, deltas, anchors = self._anchors(levels)
        proposals = self._proposals(logits, deltas, anchors, sizes)
        maps = _maps(levels)
        regions = _numbered(proposals)
        total = torch.zeros((), device=regions.device)
        for number, stage in enumerate(self.stages):
            scores, shifts = self._boxes(number, maps, regions, sizes)
            total = total + scores
            if number + 1 < len(self.stages):
                regions = refine(regions, scores[:, :-1].argmax(1), shifts, stage.stds, sizes)
        probabilities = (total / len(self.stages)).softmax(1)
        found = [
            self._best(regions[of_image, 1:], probabilities[of_image], shifts[of_image], size)
            for of_image, size in ((regions[:, 0] == image, size) for image, size in enumerate(sizes))
        ]
        if self.has_masks:
            regions = _numbered([each["boxes"] for each in found])
            labels = torch.cat([each["labels"] for each in found])
            stages = [
                self._masks(number, maps, regions, labels, sizes).sigmoid()
                for number in range(len(self.stages))
            ]
            masks = torch.stack(stages).mean(0).split([len(each["labels"]) for each in found])
            for each, mask in zip(found, masks):
                each["masks"] = mask
        return found

    def forward_dummy(self, x: Tensor) -> object:
        """Outputs of all heads: of every anchor, of 1,000 proposals and of 100 regions with a mask in each stage.

        In training, to find its memory, of as many regions as the samplers take at most.
        """
        levels = self.neck(self.backbone(x))
        proposals, with_mask = 1000, 100
        if self.training:
            proposals = len(x) * self.region_samples
            with_mask = int(proposals * POSITIVE_SHARE)
        boxes = x.new_zeros(proposals, levels[0].shape[1], BOX_SIZE, BOX_SIZE)
        regions = x.new_zeros(with_mask, levels[0].shape[1], MASK_SIZE, MASK_SIZE)
        heads = [head(boxes) for head in self.box_heads], [head(regions) for head in self.mask_heads]
        return self.rpn(levels), *heads

    def _anchors(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Of every level logits B x N_i, deltas B x N_i x 4, anchors N_i x 4, all fp32."""
        logits, deltas = self.rpn(levels)
        scores = [each.squeeze(2) for each in by_anchor(logits, 1)]
        return scores, by_anchor(deltas, 4), self.anchors(shapes_of(levels), levels[0].device)

    def _proposals(
        self,
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        anchors: Sequence[Tensor],
        sizes: Sizes,
        **limits: int,
    ) -> list[Tensor]:
        return [
            propose(
                [each[image] for each in logits], [each[image] for each in deltas], anchors, size, **limits
            )
            for image, size in enumerate(sizes)
        ]

    def _boxes(
        self, number: int, maps: Sequence[Tensor], regions: Tensor, sizes: Sizes
    ) -> tuple[Tensor, Tensor]:
        """Logits N x (K + 1) and deltas N x (K * 4) of the box head of a stage, fp32."""
        head = self.box_heads[number]
        with statistics_kept(head, not len(regions)):
            logits, deltas = head(self._pooled(maps, regions, sizes, BOX_SIZE))
        return logits[: len(regions)].float(), deltas[: len(regions)].float()

    def _masks(
        self, number: int, maps: Sequence[Tensor], regions: Tensor, labels: Tensor, sizes: Sizes
    ) -> Tensor:
        """Logits N x 28 x 28 of the mask head of a stage, each region's of its own class, fp32."""
        logits = self.mask_heads[number](self._pooled(maps, regions, sizes, MASK_SIZE))
        own: Tensor = logits[torch.arange(len(labels), device=labels.device), labels]
        return own.float()

    def _pooled(self, maps: Sequence[Tensor], regions: Tensor, sizes: Sizes, size: int) -> Tensor:
        """A map for each region, in the dtype that the heads' weights take.

        Training without a region has one, the first image, whose outputs nobody reads: so every rank runs the same modules,
        every parameter has a gradient, and BatchNorm has something to average.
        """
        if self.training and not len(regions):
            height, width = sizes[0]
            regions = regions.new_tensor([[0, 0, 0, width, height]])
        return roi_pool(maps, STRIDES[:-1], regions, size).to(self.rpn.objectness.weight.dtype)

    def _best(
        self, references: Tensor, probabilities: Tensor, deltas: Tensor, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """The objects of an image, best first."""
        rows, labels = (probabilities[:, :-1] > self.score_threshold).nonzero(as_tuple=True)
        own = deltas.unflatten(1, (-1, 4))[rows, labels]
        boxes, scores = decode(references[rows], own, self.stages[-1].stds, size), probabilities[rows, labels]
        kept = batched_nms(boxes, scores, labels, NMS)[: self.max_detections]
        return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}


def _maps(levels: Sequence[Tensor]) -> list[Tensor]:
    """What regions are taken from: all levels but the last, laid out as RoIAlign reads them, once for all stages."""
    return [level.float().contiguous() for level in levels[:-1]]


def _numbered(boxes: Sequence[Tensor]) -> Tensor:
    """Boxes of all images, N x 5, the number of the image first."""
    return torch.cat([F.pad(of_image, (1, 0), value=image) for image, of_image in enumerate(boxes)])
