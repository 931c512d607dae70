"""What an evaluation of a detector keeps beside its metrics: classes, and its worst and best images, small.

Format (JSON), the same on every rank:

- ``kind``: ``"detection"``.
- ``images``: how many were evaluated.
- ``classes``: a list of ``{"class", "objects", "found", "ap", "ap50", "ar", "mask_ap", "mask_ap50", "mask_ar"}`` for every class that has
  an object (crowds do not count) or was found: its number, its objects, its detections, and COCO's numbers of the class in percent: null
  where it has no object; those of masks are there where the metrics have them.
- ``worst``, ``best``: images by ``quality``, the lowest and the highest first: a list of ``{"position", "name", "image_id", "quality", "picture",
  "truth", "found", "truth_masks", "found_masks"}``. ``quality`` is in percent. ``picture`` is a data URL of the image, at most ``LONGEST`` pixels
  long. ``truth`` is a list of ``{"class", "box", "crowd"}``, ``found`` (those of a score of ``SCORE`` or more, the best first) one of
  ``{"class", "score", "box", "right"}``; ``box`` is x and y of the upper left corner, width and height, in pixels of the picture, ``right``
  whether it was matched to an object. ``truth_masks`` and ``found_masks`` are data URLs of gray PNGs of the picture's size, whose pixels are
  0, or 1 + the place in the list of the object that is seen there (of found ones that lie over each other the best); they are missing
  where there are no masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dattrain.data.annotations import rle
from dattrain.data.augment.dense_transforms import nearest
from dattrain.tasks.base import Ranks
from dattrain.tasks.coco_numbers import ImageResult, Numbers
from dattrain.tasks.predictions import data_url, png_url

SHOWN = 8
"""Images of either kind."""
LONGEST = 320
"""Pixels of the longer side of a picture."""
SCORE = 0.3
"""Least score of an object that is shown and judged by ``quality``; mmdetection's pictures begin there too."""
IOU = 0.5
"""Least IoU of a box with that of the object that it is matched to."""
_DRAWN = 254
"""Objects of a list that have a place in its mask."""


@dataclass(frozen=True)
class Judgement:
    """How well an image's boxes are those of its objects.

    Attributes:
        quality: see ``judge``.
        right: of each detection, whether it was matched: n bool.
    """

    quality: float
    right: NDArray[np.bool_]


@dataclass(frozen=True)
class Shown:
    """An image that may be shown: JSON but for its picture and masks (H x W uint8), which are of one size."""

    position: int
    quality: float
    content: dict[str, Any]
    picture: Tensor
    masks: Mapping[str, Tensor]


_ORDERS: dict[str, Callable[[float, int], tuple[float, int]]] = {
    "worst": lambda quality, position: (quality, position),
    "best": lambda quality, position: (-quality, position),
}


def judge(result: ImageResult) -> Judgement | None:
    """Panoptic quality (Kirillov et al., CVPR 2019) of an image's boxes, all classes together; None where there is nothing to judge.

    The detections, the best first, are each matched to the object of their class, among those that are left, whose box has the
    largest IoU with theirs, if that is ``IOU`` or more. The quality is the sum of these IoUs, divided by the matches and half of
    the detections and objects without match. A detection of which a crowd of its class covers ``IOU`` or more counts nowhere.

    Args:
        result: whose detections of a score below ``SCORE`` are left out.
    """
    truth, kept = result.truth, result.scores >= SCORE
    right = np.zeros(len(kept), dtype=np.bool_)
    objects = np.flatnonzero(~truth.crowd)
    free, shared, extra = set(objects.tolist()), 0.0, 0
    overlaps = _overlaps(result.boxes, truth.boxes, truth.crowd)
    for i in np.flatnonzero(kept).tolist():
        own = truth.classes == result.classes[i]
        left = [j for j in np.flatnonzero(own & ~truth.crowd).tolist() if j in free]
        best = max(left, key=lambda j: float(overlaps[i, j]), default=None)
        if best is not None and overlaps[i, best] >= IOU:
            free.remove(best)
            right[i], shared = True, shared + float(overlaps[i, best])
        elif not (own & truth.crowd & (overlaps[i] >= IOU)).any():
            extra += 1
    of = int(right.sum()) + (extra + len(free)) / 2
    return Judgement(shared / of, right) if of else None


class DetectedImages:
    """Looks at the images of one rank; only those that may be shown are made small and fetched from the device."""

    def __init__(self) -> None:
        self._kept: dict[str, list[Shown]] = {kind: [] for kind in _ORDERS}

    def add(self, image: Tensor, result: ImageResult) -> None:
        """Look at an image: 3 x H x W uint8, as it is stored."""
        judged = judge(result)
        if judged is None:
            return
        small: Shown | None = None
        for kind, order in _ORDERS.items():
            kept, own = self._kept[kind], order(judged.quality, result.position)
            if len(kept) < SHOWN or own < order(kept[-1].quality, kept[-1].position):
                small = small or _small(image, result, judged)
                self._kept[kind] = sorted([*kept, small], key=lambda s: order(s.quality, s.position))[:SHOWN]

    def gather(self, ranks: Ranks) -> dict[str, Any]:
        """``worst`` and ``best`` of the format above. Collective."""
        gathered = ranks.gather(self._kept)
        found = {}
        for kind, order in _ORDERS.items():
            images = sorted(
                (one for each in gathered for one in each[kind]), key=lambda s: order(s.quality, s.position)
            )
            found[kind] = [_json(image) for image in images[:SHOWN]]
        return found


def class_rows(
    objects: NDArray[np.int64], found: NDArray[np.int64], boxes: Numbers, masks: Numbers | None
) -> list[dict[str, Any]]:
    """``classes`` of the format above.

    Args:
        objects, found: of each class, K.
    """
    kinds = {"": boxes} if masks is None else {"": boxes, "mask_": masks}
    return [
        {
            "class": number,
            "objects": int(objects[number]),
            "found": int(found[number]),
            **{
                f"{prefix}{name}": _percent(getattr(kind, name)[number])
                for prefix, kind in kinds.items()
                for name in ("ap", "ap50", "ar")
            },
        }
        for number in np.flatnonzero(objects + found).tolist()
    ]


def _percent(share: float) -> float | None:
    return None if np.isnan(share) else round(100 * float(share), 4)


def _overlaps(
    found: NDArray[np.float64], truth: NDArray[np.float64], crowd: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """IoU of n x m boxes (x, y, width, height); with a crowd the share of the box found that it covers, as COCO has it."""
    low = np.maximum(found[:, None, :2], truth[None, :, :2])
    high = np.minimum((found[:, :2] + found[:, 2:])[:, None], (truth[:, :2] + truth[:, 2:])[None])
    both = np.clip(high - low, 0, None).prod(2)
    own, others = found[:, 2:].prod(1)[:, None], truth[:, 2:].prod(1)[None]
    result: NDArray[np.float64] = both / np.maximum(np.where(crowd, own, own + others - both), 1e-12)
    return result


def _small(image: Tensor, result: ImageResult, judged: Judgement) -> Shown:
    height, width = result.size
    factor = min(1.0, LONGEST / max(height, width))
    size = max(1, round(height * factor)), max(1, round(width * factor))
    picture = image
    if size != (height, width):
        picture = F.interpolate(image[None].float(), size=size, mode="bilinear", antialias=True)[0]
        picture = picture.round_().clamp_(0, 255).to(torch.uint8)
    scale = np.array([size[1] / width, size[0] / height] * 2)
    truth, kept = result.truth, np.flatnonzero(result.scores >= SCORE).tolist()
    content = {
        "name": result.key,
        "image_id": result.image_id,
        "truth": [
            {
                "class": int(truth.classes[i]),
                "box": _rounded(truth.boxes[i] * scale),
                "crowd": bool(truth.crowd[i]),
            }
            for i in range(len(truth))
        ],
        "found": [
            {
                "class": int(result.classes[i]),
                "score": round(float(result.scores[i]), 4),
                "box": _rounded(result.boxes[i] * scale),
                "right": bool(judged.right[i]),
            }
            for i in kept
        ],
    }
    masks = {}
    if result.masks is not None:
        masks["found_masks"] = _painted([result.masks[i] for i in kept], result.size, size)
        runs = [each["counts"] for each in truth.segmentations if isinstance(each, Mapping)]
        if len(runs) == len(truth):
            masks["truth_masks"] = _painted(runs, result.size, size)
    return Shown(result.position, judged.quality, content, picture.cpu(), masks)


def _painted(masks: Sequence[str], size: tuple[int, int], small: tuple[int, int]) -> Tensor:
    """1 + the place of the first of the masks at each pixel, at the size of the picture; 0 where there is none."""
    canvas = torch.zeros(small, dtype=torch.uint8)
    for place, mask in reversed(list(enumerate(masks[:_DRAWN]))):
        pixels = torch.from_numpy(rle.decode(rle.from_string(mask), *size).copy())
        canvas[nearest(pixels, small)] = place + 1
    return canvas


def _rounded(box: NDArray[np.float64]) -> list[float]:
    return [round(value, 2) for value in box.tolist()]


def _json(image: Shown) -> dict[str, Any]:
    return {
        "position": image.position,
        "quality": round(100 * image.quality, 4),
        **image.content,
        "picture": data_url(image.picture.permute(1, 2, 0).numpy()),
        **{name: png_url(Image.fromarray(mask.numpy())) for name, mask in image.masks.items()},
    }
