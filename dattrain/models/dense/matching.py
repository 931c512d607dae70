"""Which box each anchor or region is of, as mmdet's ``max_iou_assigner.py`` decides."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torchvision.ops import box_iou

NEGATIVE, IGNORED = -1, -2
PAIRS = 1 << 22
"""Of a reference and a box, whose IoU is in memory at a time: 16 MB, and a few times that while it is computed."""


@torch.no_grad()
def match(
    references: Tensor, boxes: Tensor, positive: float, negative: float, minimum: float, low_quality: bool
) -> Tensor:
    """The number of each reference's box, -1 for the background, -2 for what is neither.

    A reference is of the box that it overlaps most where their IoU is ``positive`` or more, and of the background where it is
    below ``negative``. With ``low_quality`` every box also has the references that overlap it most, if that is ``minimum`` or more,
    whatever else they overlap; the later box has what two claim.

    Args:
        references: N x 4.
        boxes: n x 4; n may be 0.

    Returns:
        N int64.
    """
    matched = references.new_full((len(references),), IGNORED, dtype=torch.int64)
    if not len(boxes):
        return matched.fill_(NEGATIVE)
    if not len(references):
        return matched
    best_of_box = boxes.new_zeros(len(boxes))
    for part, iou in _chunks(references, boxes):
        best, number = iou.max(1)
        matched[part] = torch.where(
            best >= positive, number, torch.where(best < negative, NEGATIVE, matched[part])
        )
        best_of_box = torch.maximum(best_of_box, iou.amax(0))
    if low_quality:
        numbers = torch.arange(len(boxes), device=boxes.device)
        # A box that nothing overlaps would have everything.
        wanted = torch.where((best_of_box >= minimum) & (best_of_box > 0), best_of_box, 2.0)
        for part, iou in _chunks(references, boxes):
            claimed = torch.where(iou == wanted, numbers, -1).amax(1)
            matched[part] = torch.where(claimed >= 0, claimed, matched[part])
    return matched


def _chunks(references: Tensor, boxes: Tensor) -> Iterator[tuple[slice, Tensor]]:
    size = max(1, PAIRS // len(boxes))
    for first in range(0, len(references), size):
        part = slice(first, first + size)
        yield part, box_iou(references[part], boxes)
