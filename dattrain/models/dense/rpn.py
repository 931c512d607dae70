"""From anchors to proposals: the losses of a Region Proposal Network (Ren et al., NeurIPS 2015), and the regions it proposes.

mmdet's ``dense_heads/rpn_head.py`` and ``anchor_head.py``. All tensors are fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms

from dattrain.models.dense.boxes import decode, encode
from dattrain.models.dense.matching import match
from dattrain.models.dense.sampling import sample

STDS = (1.0, 1.0, 1.0, 1.0)
SAMPLES, POSITIVE_SHARE = 256, 0.5
NMS = 0.7
PROPOSALS = 1000
"""Of an image in evaluation; as many anchors of each level are looked at."""


def rpn_losses(
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    inside: Sequence[Tensor],
    boxes: Sequence[Tensor | None],
    keys: Tensor,
    *,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of the objectness, and L1 of the positives' deltas.

    256 anchors of each image are trained on, at most half of them positive: those of an IoU of .7 or more with a box, and
    each box's best from .3 on. Both losses are divided by the anchors sampled from all images (at least one positive and
    one negative of each are counted).

    Args:
        logits: B x N.
        deltas: B x N x 4.
        anchors: N x 4.
        inside: N bool of each image: anchors that take part.
        boxes: n x 4 of each image, or None for one that has no part.
        keys: B int64, see ``sampling.key_of``.
        beta: below this difference the L1 is quadratic (smooth L1); 0 for none.
    """
    rows, targets, positives = [], [], []
    total = 0
    for image, (of_image, allowed) in enumerate(zip(boxes, inside)):
        if of_image is None:
            continue
        candidates = allowed.nonzero()[:, 0]
        matched = torch.full_like(allowed, -2, dtype=torch.int64)
        matched[candidates] = match(
            anchors[candidates], of_image, positive=0.7, negative=0.3, minimum=0.3, low_quality=True
        )
        positive, negative = sample(matched, keys[image], total=SAMPLES, positive_share=POSITIVE_SHARE)
        total += max(len(positive), 1) + max(len(negative), 1)
        rows += [positive + image * len(anchors), negative + image * len(anchors)]
        targets.append(encode(anchors[positive], of_image[matched[positive]], STDS))
        positives += [
            torch.ones_like(positive, dtype=torch.bool),
            torch.zeros_like(negative, dtype=torch.bool),
        ]
    if not rows:
        return logits[:0].sum(), deltas[:0].sum()
    row, is_positive = torch.cat(rows), torch.cat(positives)
    found = logits.flatten()[row]
    loss_cls = F.binary_cross_entropy_with_logits(found, is_positive.to(found.dtype), reduction="sum")
    difference = deltas.flatten(0, 1)[row[is_positive]], torch.cat(targets)
    loss_bbox = F.smooth_l1_loss(*difference, beta=beta, reduction="sum")
    return loss_cls / total, loss_bbox / total


def inside_of(anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """Anchors without a part outside of the image of (height, width): mmdet's ``allowed_border=0``. N x 4 -> N bool."""
    height, width = size
    low, high = (anchors[:, :2] >= 0).all(1), anchors[:, 2:] < anchors.new_tensor([width, height])
    return low & high.all(1)


@torch.no_grad()
def propose(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    size: tuple[int, int],
    *,
    per_level: int = PROPOSALS,
    total: int = PROPOSALS,
) -> Tensor:
    """The best regions of an image, best first: at most ``total`` x 4, clipped to the image and not empty.

    The best ``per_level`` anchors of each level are decoded; non-maximum suppression is within a level.

    Args:
        logits: N_i of each level.
        deltas: N_i x 4 of each level.
        anchors: N_i x 4 of each level.
        size: height and width of the image, without padding.
    """
    boxes, scores, numbers = [], [], []
    for number, (of_level, shifts, references) in enumerate(zip(logits, deltas, anchors)):
        # Stable, so that equal ones, as of a flat background, come in the same order on every device.
        score, order = of_level.sort(descending=True, stable=True)
        order = order[:per_level]
        boxes.append(decode(references[order], shifts[order], STDS, size))
        scores.append(score[:per_level])
        numbers.append(torch.full_like(order, number))
    box, score, number_of = torch.cat(boxes), torch.cat(scores), torch.cat(numbers)
    width, height = (box[:, 2:] - box[:, :2]).unbind(1)
    there = (width > 0) & (height > 0)
    box, score, number_of = box[there], score[there], number_of[there]
    return box[batched_nms(box, score, number_of, NMS)[:total]]
