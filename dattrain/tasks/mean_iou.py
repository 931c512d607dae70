"""One pass over the evaluation set of a segmentation: mIoU, mAcc, aAcc and loss, exact over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dattrain.config.schema import Config
from dattrain.data.dense_batch import SegmentationBatch
from dattrain.errors import UserError
from dattrain.tasks.base import Forward, Ranks
from dattrain.tasks.confusion import confusion, scores
from dattrain.tasks.dense_inference import Inference, decide
from dattrain.tasks.segmented_images import SegmentedImages, Shown


class MeanIoU:
    """See ``dattrain.tasks.base.Evaluator``; takes the batches of ``dense_factory.eval_loader``: one image, or none.

    Pixels are counted in whole numbers, so that the metrics are the same whatever ranks the images are divided over.
    """

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype) -> None:
        classes = config.model.num_classes
        self._what = f"data.val={config.data.val}"
        self._inference = Inference(config, dtype)
        self._matrix = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        # Loss, images.
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._images = SegmentedImages()
        self._reduced = False

    def update(self, forward: Forward, batch: SegmentationBatch, *, lockstep: bool) -> None:
        """Count an image."""
        if not len(batch):
            if lockstep:
                self._inference.nothing(forward, self._matrix.device)
            return
        (image,), (truth,) = batch.images, batch.maps
        views = self._inference.views(forward, image, lockstep=lockstep)
        found = decide(views, tuple(truth.shape), truth)
        assert found.loss is not None
        matrix = confusion(truth, found.classes, len(self._matrix))
        # As in training: the mean over all pixels, void ones with no loss. Bad images have nothing but void.
        loss = found.loss.mean().double()
        self._matrix += matrix
        self._sums += torch.stack([loss * batch.weight[0], batch.weight[0].double()])
        iou, accuracy, labelled, loss_here = _of_image(matrix, loss).tolist()
        if labelled:
            position = int(batch.position[0])
            seen = Shown(position, batch.keys[0], iou, accuracy, loss_here, image, truth, found.classes)
            self._images.add(seen)

    def compute(self, ranks: Ranks) -> dict[str, float]:
        """``miou``, ``macc`` and ``aacc`` in percent, ``loss`` in nats (a mean over images), ``images``.

        Raises:
            UserError: not one pixel of the set has a class.
        """
        self._reduce(ranks)
        loss, images = self._sums.tolist()
        found = scores(self._matrix)
        if not int(self._matrix.sum()):
            raise UserError(
                f"{self._what}: no pixel of its {images:.0f} images has a class, so there is no mIoU"
            )
        return {
            "miou": found.miou,
            "macc": found.macc,
            "aacc": found.aacc,
            "loss": loss / max(images, 1.0),
            "images": images,
        }

    def predictions(self, ranks: Ranks) -> dict[str, Any]:
        """Classes, what they are confused with, and images; see ``segmented_images``."""
        self._reduce(ranks)
        return {"images": int(self._sums[1]), **self._images.gather(ranks, self._matrix)}

    def _reduce(self, ranks: Ranks) -> None:
        if not self._reduced:
            ranks.sum(self._matrix)
            ranks.sum(self._sums)
            self._reduced = True


def _of_image(matrix: Tensor, loss: Tensor) -> Tensor:
    """Mean IoU over the classes of an image's truth, its share of right pixels, its labelled pixels, its loss: 4 float64."""
    counts = matrix.double()
    right, truth = counts.diagonal(), counts.sum(1)
    iou = right / (truth + counts.sum(0) - right).clamp(min=1)
    there = (truth > 0).double()
    labelled = truth.sum()
    return torch.stack(
        [(iou * there).sum() / there.sum().clamp(min=1), right.sum() / labelled.clamp(min=1), labelled, loss]
    )
