"""What an evaluation of a segmentation keeps beside its metrics: classes, confusions, and its worst and best images, small.

Format (JSON), the same on every rank:

- ``kind``: ``"segmentation"``.
- ``images``: how many were evaluated.
- ``classes``: a list of ``{"class", "pixels", "predicted", "iou", "accuracy"}`` for every class that is in the truth or in the
  prediction: its number, its labelled pixels, the labelled pixels that were taken for it, and both in percent (``accuracy`` is null
  where the truth has none of it).
- ``pairs``: ``[true class, predicted class, pixels]`` of mistakes, the most frequent first.
- ``worst``, ``best``: images by their own mean IoU over the classes that are in their truth, the lowest and the highest first: a list of
  ``{"position", "name", "iou", "accuracy", "loss", "picture", "truth", "prediction"}``. ``iou`` and ``accuracy`` are in percent, ``loss`` in
  nats. ``picture`` is a data URL of the image, at most ``LONGEST`` pixels long; ``truth`` and ``prediction`` are data URLs of gray PNGs of
  the same size, whose pixels are class numbers (255: void).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dattrain.data.augment.dense_transforms import nearest
from dattrain.tasks.base import Ranks
from dattrain.tasks.confusion import scores
from dattrain.tasks.predictions import data_url, png_url

SHOWN = 8
"""Images of either kind."""
LONGEST = 256
"""Pixels of the longer side of a picture."""
PAIRS = 500
"""Confused pairs of classes at most."""


@dataclass(frozen=True)
class Shown:
    """An image that may be shown.

    Attributes:
        position: its place in the set.
        iou, accuracy: shares; see ``worst`` above.
        loss: nats.
        picture: 3 x H x W uint8.
        truth, prediction: H x W uint8.
    """

    position: int
    name: str
    iou: float
    accuracy: float
    loss: float
    picture: Tensor
    truth: Tensor
    prediction: Tensor


_ORDERS: dict[str, Callable[[Shown], tuple[float, int]]] = {
    "worst": lambda image: (image.iou, image.position),
    "best": lambda image: (-image.iou, image.position),
}


class SegmentedImages:
    """Adds up the images of one rank; only those that may be shown are made small and fetched from the device."""

    def __init__(self) -> None:
        self._kept: dict[str, list[Shown]] = {kind: [] for kind in _ORDERS}

    def add(self, image: Shown) -> None:
        """Look at an image of any size."""
        small: Shown | None = None
        for kind, order in _ORDERS.items():
            kept = self._kept[kind]
            if len(kept) < SHOWN or order(image) < order(kept[-1]):
                small = small or _small(image)
                self._kept[kind] = sorted([*kept, small], key=order)[:SHOWN]

    def gather(self, ranks: Ranks, matrix: Tensor) -> dict[str, Any]:
        """All but ``images`` of the format above. Collective.

        Args:
            matrix: of all ranks together (``confusion.confusion``).
        """
        counts = matrix.cpu().numpy()
        found = scores(counts)
        truth, predicted = counts.sum(1), counts.sum(0)
        wrong = counts * (1 - np.eye(len(counts), dtype=np.int64))
        order = np.argsort(-wrong, axis=None, kind="stable")[: min(PAIRS, np.count_nonzero(wrong))]
        pairs = [divmod(int(cell), len(counts)) for cell in order]
        classes = [
            {
                "class": int(number),
                "pixels": int(truth[number]),
                "predicted": int(predicted[number]),
                "iou": round(float(found.iou[number]), 4),
                "accuracy": round(float(found.accuracy[number]), 4) if truth[number] else None,
            }
            for number in np.flatnonzero(truth + predicted)
        ]
        gathered = ranks.gather(self._kept)
        return {
            "kind": "segmentation",
            "classes": classes,
            "pairs": [[a, b, int(wrong[a, b])] for a, b in pairs],
            **{
                kind: [
                    _json(image)
                    for image in sorted((one for each in gathered for one in each[kind]), key=order)[:SHOWN]
                ]
                for kind, order in _ORDERS.items()
            },
        }


def _small(image: Shown) -> Shown:
    picture, truth, prediction = image.picture, image.truth, image.prediction
    height, width = truth.shape
    factor = min(1.0, LONGEST / max(height, width))
    if factor < 1:
        size = max(1, round(height * factor)), max(1, round(width * factor))
        picture = F.interpolate(picture[None].float(), size=size, mode="bilinear", antialias=True)[0]
        picture = picture.round_().clamp_(0, 255).to(torch.uint8)
        truth, prediction = nearest(truth, size), nearest(prediction, size)
    return replace(image, picture=picture.cpu(), truth=truth.cpu(), prediction=prediction.cpu())


def _json(image: Shown) -> dict[str, Any]:
    return {
        "position": image.position,
        "name": image.name,
        "iou": round(100 * image.iou, 4),
        "accuracy": round(100 * image.accuracy, 4),
        "loss": round(image.loss, 6),
        "picture": data_url(image.picture.permute(1, 2, 0).numpy()),
        "truth": png_url(Image.fromarray(image.truth.numpy())),
        "prediction": png_url(Image.fromarray(image.prediction.numpy())),
    }
