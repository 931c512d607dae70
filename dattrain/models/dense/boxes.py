"""Boxes and their deltas from references (Girshick et al., CVPR 2014, appendix C), as mmdet's ``delta_xywh_bbox_coder.py``.

All boxes are x1, y1, x2, y2 in pixels, fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import torch
from torch import Tensor

CLIP = log(1000 / 16)
"""Most of a delta of width or height: no network finds by how much more a reference is to grow."""


def encode(reference: Tensor, boxes: Tensor, stds: Sequence[float]) -> Tensor:
    """Deltas from N references to N boxes of positive sides: centre in sides of the reference, logarithms of sides, divided by ``stds``.

    Args:
        reference, boxes: N x 4.
        stds: of the four deltas.

    Returns:
        N x 4.
    """
    middle, sides = _middle_and_sides(reference)
    other_middle, other_sides = _middle_and_sides(boxes)
    deltas = torch.cat([(other_middle - middle) / sides, (other_sides / sides).log()], -1)
    return deltas / deltas.new_tensor(stds)


def decode(
    reference: Tensor, deltas: Tensor, stds: Sequence[float], size: tuple[int, int] | None = None
) -> Tensor:
    """The boxes that deltas lead to; the inverse of ``encode`` where no side changes by more than a factor of 1000 / 16.

    Args:
        reference: N x 4.
        deltas: N x 4, any float dtype.
        size: (height, width) that boxes are cut at; None leaves them whole.

    Returns:
        N x 4 fp32.
    """
    shift, growth = (deltas.float() * reference.new_tensor(stds)).split(2, -1)
    middle, sides = _middle_and_sides(reference)
    middle, half = middle + shift * sides, growth.clamp(-CLIP, CLIP).exp() * sides / 2
    boxes = torch.cat([middle - half, middle + half], -1)
    return boxes if size is None else clip(boxes, size)


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """N x 4 boxes without what is outside of an image of ``size`` (height, width)."""
    height, width = size
    return torch.stack(
        [side.clamp(0, limit) for side, limit in zip(boxes.unbind(-1), (width, height, width, height))],
        -1,
    )


def _middle_and_sides(boxes: Tensor) -> tuple[Tensor, Tensor]:
    low, high = boxes.split(2, -1)
    return (low + high) / 2, high - low
