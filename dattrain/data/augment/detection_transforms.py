"""What a detection plan says, done to one image and its objects. Images are uint8, and every pixel is resampled once.

In this order: resize, crop, flip, objects of another image pasted in, photometric distortion. Padding is a batch's matter
(``dattrain.data.decode.detection``), normalisation the device's (``dense_transforms.normalised``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dattrain.data.annotations.instances import Instances
from dattrain.data.augment.dense_transforms import distort, resize
from dattrain.data.augment.detection_plan import DetectionPlan
from dattrain.data.augment.placed_objects import PlacedObjects, coverage, place
from dattrain.data.augment.placement import Placement
from dattrain.data.detection_batch import GRID

_HIDDEN, _MOVED = 300, 10
"""An object of which a paste leaves no more pixels than that goes, if a side of its box moves by more than that."""


@dataclass(frozen=True)
class StoredImage:
    """An image as it is stored (3 x H x W uint8), and what is learned from of its objects, their classes being the network's."""

    image: Tensor
    objects: Instances

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        height, width = self.image.shape[1:]
        return height, width


@dataclass(frozen=True)
class Targets:
    """N objects of an image: see ``DetectionBatch``; ``masks`` are N x 0 x 0 where none are wanted."""

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    masks: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.labels)


def no_targets(masks: bool) -> Targets:
    """Of an image without objects."""
    side = GRID if masks else 0
    return Targets(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros((0, side, side), np.uint8))


def train_sample(
    stored: StoredImage, plan: DetectionPlan, sample: int, *, masks: bool, partner: StoredImage | None = None
) -> tuple[Tensor, Targets]:
    """Image and objects as sample ``sample`` of the plan says, not padded.

    Args:
        masks: whether masks are wanted.
        partner: whose objects are pasted in: that of row ``plan.partner[sample]``; None pastes nothing. All objects of both need masks.
    """
    placed = place(stored.objects, stored.size, plan.placement(sample, *stored.size))
    image = lay(stored.image, placed.placement, plan.dense.interpolation)
    if partner is None:
        targets = _of(placed, range(len(placed)), masks)
    else:
        row = int(plan.partner[sample])
        where = plan.placement(row, *partner.size).cut(*placed.placement.shape)
        others = place(partner.objects, partner.size, where)
        chosen = plan.pasted(sample, len(others)).tolist()
        image, targets = paste(image, placed, others, chosen, partner.image, plan.dense.interpolation, masks)
    return distort(image, plan.dense, sample), targets


def lay(image: Tensor, placement: Placement, interpolation: str) -> Tensor:
    """What a placement makes of a stored image (3 x H x W uint8)."""
    top, left, height, width = placement.box
    part = image[:, top : top + height, left : left + width]
    part = resize(part, placement.size, interpolation)[:, placement.rows, placement.columns]
    return part.flip(2) if placement.flip else part


def paste(
    image: Tensor,
    own: PlacedObjects,
    others: PlacedObjects,
    chosen: Sequence[int],
    other_image: Tensor,
    interpolation: str,
    masks: bool,
) -> tuple[Tensor, Targets]:
    """Copy-paste (Ghiasi et al., CVPR 2021): chosen objects of another image come to lie on this one, where its own placement has them.

    Pixels are replaced, without blending (which made no difference to them). Masks and boxes of what lies beneath are those of
    what is still seen. An object of which nothing is seen goes; so does one with at most 300 pixels left and a side of its box
    moved by more than 10, by the rule and the numbers of mmdetection's CopyPaste.

    Args:
        image: 3 x H x W uint8, as it was laid.
        own: its objects.
        others: of the other image, whose placement is cut to this one's size.
        chosen: which of them.
        other_image: as it is stored.
        masks: whether masks are wanted.
    """
    above = np.zeros(own.placement.shape, dtype=np.bool_)
    for number in chosen:
        window, mask = others.pixels(number)
        above[window] |= mask
    if not above.any():
        return image, _of(own, range(len(own)), masks)
    height, width = others.placement.shape
    laid = lay(other_image, others.placement, interpolation)
    image = image.clone()
    corner = image[:, :height, :width]
    corner.copy_(torch.where(torch.from_numpy(above[:height, :width]), laid, corner))
    beneath = (_beneath(own, number, above, masks) for number in range(len(own)))
    return image, joined([*(one for one in beneath if one is not None), _of(others, chosen, masks)], masks)


def _beneath(own: PlacedObjects, number: int, above: NDArray[np.bool_], masks: bool) -> Targets | None:
    """What is left of an object under the pixels of ``above`` (H x W); None where it goes."""
    window = own.window(number)
    if not above[window].any():
        return _of(own, [number], masks)
    _, mask = own.pixels(number)
    left = mask & ~above[window]
    if left.sum() == mask.sum():
        return _of(own, [number], masks)
    if not _remains(mask, left):
        return None
    box = _tight(left)
    grids = coverage(left, (box[0], box[1], box[2], box[3]))[None] if masks else None
    rows, columns = window
    return _targets(box[None] + [columns.start, rows.start] * 2, own.labels[number : number + 1], grids)


def _remains(mask: NDArray[np.bool_], left: NDArray[np.bool_]) -> bool:
    """Whether an object (H x W) of which these pixels are left is still one."""
    count = int(left.sum())
    if not count:
        return False
    return count > _HIDDEN or bool((abs(_tight(left) - _tight(mask)) <= _MOVED).all())


def _tight(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Left, top, right and bottom of the pixels of a mask that has some."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float64)


def _of(placed: PlacedObjects, which: Sequence[int], masks: bool) -> Targets:
    """These objects, none of which is hidden."""
    numbers = np.asarray(which, dtype=np.int64)
    grids = None
    if masks:
        grids = np.empty((len(numbers), GRID, GRID), dtype=np.uint8)
        for grid, number in zip(grids, which):
            grid[:] = placed.coverage(number)
    return _targets(placed.boxes[numbers], placed.labels[numbers], grids)


def _targets(
    boxes: NDArray[np.float64], labels: NDArray[np.int64], grids: NDArray[np.uint8] | None
) -> Targets:
    """``grids`` are N x G x G; None where no masks are wanted."""
    none = np.zeros((len(labels), 0, 0), dtype=np.uint8)
    return Targets(boxes.astype(np.float32), labels, none if grids is None else grids)


def joined(parts: Sequence[Targets], masks: bool) -> Targets:
    """The objects of all parts, which have masks or have none."""
    boxes, labels, grids = (
        np.concatenate([getattr(part, name) for part in (no_targets(masks), *parts)])
        for name in ("boxes", "labels", "masks")
    )
    return Targets(boxes, labels, grids)
