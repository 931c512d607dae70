"""One pass over the evaluation set of a detector: COCO's numbers of its boxes and masks, the same at every number of ranks."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dattrain.config.schema import Config
from dattrain.data.annotations import rle
from dattrain.data.annotations.instances import Instances
from dattrain.data.annotations.kinds import needs_masks
from dattrain.data.annotations.segmentations import Segmentation
from dattrain.data.detection_batch import DetectionBatch
from dattrain.errors import UserError
from dattrain.files import counted
from dattrain.tasks import coco_numbers
from dattrain.tasks.base import Forward, Ranks
from dattrain.tasks.coco_numbers import NAMES, ImageResult, Numbers
from dattrain.tasks.detected_images import DetectedImages, class_rows
from dattrain.tasks.detection_inference import DetectionInference, Objects, paste

log = logging.getLogger(__name__)

MASK = "mask_"
"""Before the names of masks' numbers."""


def names(head: str) -> tuple[str, ...]:
    """What an evaluation of ``task.head`` has numbers of: ``ap``, ..., and ``mask_ap``, ... where it gives masks."""
    return (*NAMES, *(f"{MASK}{name}" for name in NAMES)) if needs_masks("detection", head) else NAMES


class CocoAP:
    """See ``dattrain.tasks.base.Evaluator``; takes the batches of ``detection_factory.eval_loader``: one image, or none.

    Results are gathered on rank 0, which alone computes. They are in the order of the images' places in the set, so that the
    numbers are the same whatever ranks these are divided over.

    Attributes:
        results: of all images, by position, after ``compute``, on rank 0 alone; empty elsewhere.
    """

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype) -> None:
        self.results: list[ImageResult] = []
        self._what, self._device = f"data.val={config.data.val}", device
        self._classes, self._most = config.model.num_classes, config.eval.max_detections
        self._masks = needs_masks(config.task.kind, config.task.head)
        self._inference = DetectionInference(config, dtype)
        self._own: list[ImageResult] = []
        self._images = DetectedImages()
        self._reduced: tuple[int, dict[str, Numbers], list[dict[str, Any]]] | None = None

    def update(self, forward: Forward, batch: DetectionBatch, *, lockstep: bool) -> None:
        """Find the objects of an image; one that could not be read counts nowhere."""
        if not len(batch):
            if lockstep:
                self._inference.nothing(forward, self._device)
            return
        (image,), (truth,) = batch.images, batch.truth
        found = self._inference(forward, image)
        if batch.bad:
            return
        result = self._result(batch, found, truth)
        self._own.append(result)
        self._images.add(image, result)

    def compute(self, ranks: Ranks) -> dict[str, float]:
        """The metrics of ``names`` in percent, and ``images``.

        Those that no object could be of are left out: ``ap_large`` where none is large (pycocotools has -1 there), and those of masks
        where an object of the set has a box alone.

        Raises:
            UserError: no object in the whole set.
        """
        images, numbers, _ = self._reduce(ranks)
        found = {
            f"{prefix}{name}": 100 * value
            for prefix, each in numbers.items()
            for name, value in each.summary.items()
            if not np.isnan(value)
        }
        return {**found, "images": float(images)}

    def predictions(self, ranks: Ranks) -> dict[str, Any]:
        """Classes and images; see ``detected_images``."""
        images, _, classes = self._reduce(ranks)
        return {"kind": "detection", "images": images, "classes": classes, **self._images.gather(ranks)}

    def _reduce(self, ranks: Ranks) -> tuple[int, dict[str, Numbers], list[dict[str, Any]]]:
        if self._reduced is not None:
            return self._reduced
        gathered = ranks.gather_to_first(self._own)
        self._own = []
        if gathered is not None:
            self.results = sorted((one for each in gathered for one in each), key=lambda one: one.position)
        images, with_masks = ranks.on_first(self._looked_at)
        # One after the other, since each may take minutes.
        numbers = {
            prefix: ranks.on_first(lambda kind=kind: self._numbers(kind))  # type: ignore[misc]
            for prefix, kind in {"": "bbox", **({MASK: "segm"} if with_masks else {})}.items()
        }
        rows = ranks.on_first(lambda: self._rows(numbers))
        self._reduced = images, numbers, rows
        return self._reduced

    def _looked_at(self) -> tuple[int, bool]:
        """How many images there are, and whether masks can be measured. Raises UserError where nothing can."""
        truth = [image.truth for image in self.results]
        objects = sum(int((~each.crowd).sum()) for each in truth)
        if not objects:
            raise UserError(
                f"{self._what}: there is no object in its {counted(len(truth), 'image')}, so there is no AP"
            )
        maskless = [image.key for image in self.results for each in image.truth.segmentations if each is None]
        if self._masks and maskless:
            log.warning(
                "%s: %s with a box and no mask, the first in %s, so there are no numbers of masks",
                self._what, counted(len(maskless), "object"), maskless[0],
            )  # fmt: skip
        return len(truth), self._masks and not maskless

    def _numbers(self, kind: coco_numbers.Kind) -> Numbers:
        return coco_numbers.numbers(self.results, self._classes, kind, self._most)

    def _rows(self, numbers: dict[str, Numbers]) -> list[dict[str, Any]]:
        objects, found = (
            np.bincount(np.concatenate(each), minlength=self._classes)
            for each in (
                [image.truth.classes[~image.truth.crowd] for image in self.results],
                [image.classes for image in self.results],
            )
        )
        return class_rows(objects, found, numbers[""], numbers.get(MASK))

    def _result(self, batch: DetectionBatch, found: Objects, truth: Instances) -> ImageResult:
        size = int(batch.images.shape[2]), int(batch.images.shape[3])
        boxes, scores, classes = (each.cpu() for each in (found.boxes, found.scores, found.classes))
        # mmdetection clips to the resized image; sides that were rounded then go a little beyond the stored one.
        edges = boxes.new_tensor([size[1], size[0]]).repeat(2)
        boxes = torch.minimum(boxes.clamp(min=0), edges)
        masks = None if found.masks is None else _masks(found.masks.cpu(), boxes, size)
        corners = boxes.double().numpy()
        segmentations: list[Segmentation | None] = [None] * len(truth)
        if masks is not None:
            segmentations = [
                None if each is None else coco_numbers.compressed(each, size) for each in truth.segmentations
            ]
        return ImageResult(
            position=int(batch.position[0]),
            image_id=batch.image_ids[0],
            key=batch.keys[0],
            size=size,
            boxes=np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1),
            scores=scores.double().numpy(),
            classes=classes.numpy(),
            masks=masks,
            truth=replace(truth, segmentations=tuple(segmentations)),
        )


def _masks(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> tuple[str, ...]:
    """Compressed run lengths of masks at the size of the image, one laid out after another, and each over its box alone."""
    found = []
    for probability, box in zip(probabilities, boxes):
        pasted = paste(probability, box, size)
        counts = rle.encode_part(pasted.pixels.numpy(), pasted.top, pasted.left, *size)
        found.append(rle.to_string(counts))
    return tuple(found)
