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
  nats. ``picture`` is a data URL of the image, at most ``LONGEST`` pixels long; ``truth`` and ``prediction`` are data URLs of PNGs of the
  same size, whose pixels are class numbers (255: void) with the colours of ``dattrain.palette`` for those who only show them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dattrain.data.annotations.semantic import VOID
from dattrain.data.augment.dense_transforms import nearest
from dattrain.palette import palette
from dattrain.tasks.base import Ranks
from dattrain.tasks.confusion import scores
from dattrain.tasks.predictions import data_url

SHOWN = 8
"""Images of either kind."""
LONGEST = 256
"""Pixels of the longer side of a picture."""
PAIRS = 500
"""Confused pairs of classes at most."""


@dataclass(frozen=True)
class _Seen:
    """An image that may be shown."""

    position: int
    name: str
    iou: float
    accuracy: float
    loss: float
    picture: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    prediction: NDArray[np.uint8]


class SegmentedImages:
    """Adds up the images of one rank; only those that may be shown are made small and fetched from the device."""

    def __init__(self) -> None:
        self._worst: list[_Seen] = []
        self._best: list[_Seen] = []

    def add(
        self,
        position: int,
        name: str,
        iou: float,
        accuracy: float,
        loss: float,
        image: Tensor,
        truth: Tensor,
        prediction: Tensor,
    ) -> None:
        """Look at an image.

        Args:
            position: its place in the set.
            iou, accuracy: shares; see ``worst`` above.
            image: 3 x H x W uint8.
            truth, prediction: H x W uint8.
        """
        seen: _Seen | None = None
        for kept, order in ((self._worst, _worst_first), (self._best, _best_first)):
            mine = order(position, iou)
            if len(kept) == SHOWN and mine > order(kept[-1].position, kept[-1].iou):
                continue
            seen = seen or _small(position, name, iou, accuracy, loss, image, truth, prediction)
            kept.append(seen)
            kept.sort(key=lambda each, by=order: by(each.position, each.iou))  # type: ignore[misc]
            del kept[SHOWN:]

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
        gathered = ranks.gather((self._worst, self._best))
        return {
            "kind": "segmentation",
            "classes": classes,
            "pairs": [[a, b, int(wrong[a, b])] for a, b in pairs],
            **{
                kind: [
                    _json(each, len(counts))
                    for each in sorted(
                        (one for every in gathered for one in every[which]),
                        key=lambda one, by=by: by(one.position, one.iou),  # type: ignore[misc]
                    )[:SHOWN]
                ]
                for which, (kind, by) in enumerate((("worst", _worst_first), ("best", _best_first)))
            },
        }


_Order = Callable[[int, float], tuple[float, int]]


def _worst_first(position: int, iou: float) -> tuple[float, int]:
    return iou, position


def _best_first(position: int, iou: float) -> tuple[float, int]:
    return -iou, position


def _small(
    position: int,
    name: str,
    iou: float,
    accuracy: float,
    loss: float,
    image: Tensor,
    truth: Tensor,
    prediction: Tensor,
) -> _Seen:
    height, width = truth.shape
    factor = min(1.0, LONGEST / max(height, width))
    size = max(1, round(height * factor)), max(1, round(width * factor))
    if factor < 1:
        image = F.interpolate(image[None].float(), size=size, mode="bilinear", antialias=True)[0]
        image = image.round_().clamp_(0, 255).to(torch.uint8)
        truth, prediction = nearest(truth, size), nearest(prediction, size)
    picture = image.permute(1, 2, 0).contiguous()
    return _Seen(
        position, name, iou, accuracy, loss, *(each.cpu().numpy() for each in (picture, truth, prediction))
    )


def _json(seen: _Seen, classes: int) -> dict[str, Any]:
    return {
        "position": seen.position,
        "name": seen.name,
        "iou": round(100 * seen.iou, 4),
        "accuracy": round(100 * seen.accuracy, 4),
        "loss": round(seen.loss, 6),
        "picture": data_url(seen.picture),
        "truth": map_url(seen.truth, classes),
        "prediction": map_url(seen.prediction, classes),
    }


def map_url(numbers: NDArray[np.uint8], classes: int) -> str:
    """H x W class numbers as a data URL: a PNG of these numbers, with a palette of as many colours and grey for void."""
    colours = np.zeros((256, 3), np.uint8)
    colours[:classes] = palette(classes)
    colours[VOID] = 128
    image = Image.fromarray(np.ascontiguousarray(numbers), mode="P")
    image.putpalette(colours.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
