"""Which box each anchor or region is of, as mmdet's ``max_iou_assigner.py`` decides."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou

NEGATIVE, IGNORED = -1, -2
PAIRS = 1 << 22
"""Of a box and a reference, whose IoU is in memory at a time: 16 MB, and ten times that while it is computed."""


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
        N int64. Nothing is synchronised with the device.
    """
    number = len(references)
    best = references.new_zeros(number)
    closest = torch.zeros(number, dtype=torch.int64, device=references.device)
    claimed = torch.full_like(closest, -1)
    step = max(1, PAIRS // max(1, number))
    for first in range(0, len(boxes), step):
        if not number:
            break
        iou = box_iou(boxes[first : first + step], references)
        highest, index = iou.max(0)
        # Of equal ones the first box, as if all were seen at once.
        closest = torch.where(highest > best, index + first, closest)
        best = torch.maximum(best, highest)
        if low_quality:
            most = iou.amax(1, keepdim=True)
            # A box that nothing overlaps would have everything.
            wanted = (iou == most) & (most >= minimum) & (most > 0)
            numbers = torch.arange(first, first + len(iou), device=boxes.device)[:, None]
            claimed = torch.maximum(claimed, torch.where(wanted, numbers, -1).amax(0))
    matched = torch.where(best >= positive, closest, torch.where(best < negative, NEGATIVE, IGNORED))
    return torch.where(claimed >= 0, claimed, matched)
