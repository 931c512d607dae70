"""COCO's average precision and recall of boxes and masks (Lin et al., ECCV 2014), by faster-coco-eval.

The numbers are those of pycocotools' ``COCOeval``, to rounding: IoU thresholds .5 to .95 in steps of .05, 101 recall thresholds, areas small (below 32^2
pixels), medium and large (from 96^2), detections on a crowd neither right nor wrong. Pure: results in, numbers out; which image is
whose, and how ranks exchange them, is ``coco_ap``'s.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dattrain.data.annotations.instances import Instances
from dattrain.data.annotations.segmentations import Segmentation
from dattrain.errors import UserError

NAMES = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip
"""COCO's twelve numbers, in the order of ``COCOeval.stats``."""
DETECTIONS = (1, 10, 100)
"""Of an image, for ``ar1``, ``ar10`` and ``ar100``; the other numbers are at the last, or at ``eval.max_detections`` where that is more."""
AREAS = ("small", "medium", "large")
_ALL = 0

Kind = Literal["bbox", "segm", "boundary"]
"""What an IoU is of: boxes, masks, or masks and their outlines (Boundary IoU, Cheng et al., CVPR 2021)."""


@dataclass(frozen=True)
class ImageResult:
    """What was found in one image, and what is in it.

    Attributes:
        position: its place in the set; unique.
        image_id: what its set calls it.
        key: its name.
        size: height and width as it is stored.
        boxes: n x 4 float64, x and y of the upper left corner, width, height, in pixels; the best first.
        scores: n float64.
        classes: n int64, numbers of the network's classes.
        masks: COCO's compressed run lengths of each; None where the network gives boxes alone.
        truth: classes and boxes likewise; ``segmentations`` compressed run lengths, or None.
    """

    position: int
    image_id: int | str
    key: str
    size: tuple[int, int]
    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    classes: NDArray[np.int64]
    masks: tuple[str, ...] | None
    truth: Instances

    def results(self, category_ids: Sequence[int | None]) -> list[dict[str, Any]]:
        """In COCO's result format, the best first.

        Args:
            category_ids: what a file calls each class (``data.annotations.detection.category_ids``); what is of a class that it
                does not have is left out, since there is no way to say it.
        """
        found = []
        for i, number in enumerate(self.classes.tolist()):
            if (category := category_ids[number]) is None:
                continue
            one: dict[str, Any] = {
                "image_id": self.image_id,
                "category_id": category,
                "bbox": self.boxes[i].tolist(),
                "score": float(self.scores[i]),
            }
            if self.masks is not None:
                one["segmentation"] = {"size": list(self.size), "counts": self.masks[i]}
            found.append(one)
        return found


@dataclass(frozen=True)
class Numbers:
    """Shares, not percent; NaN where there is no object that a number could be of (pycocotools has -1).

    Attributes:
        summary: the twelve, by name.
        ap, ap50, ar: of each class: K float64; ``ar`` at the most detections.
    """

    summary: Mapping[str, float]
    ap: NDArray[np.float64]
    ap50: NDArray[np.float64]
    ar: NDArray[np.float64]


def check_installed() -> None:
    """Raise UserError where faster-coco-eval is missing."""
    if importlib.util.find_spec("faster_coco_eval") is None:
        raise UserError(
            "COCO's AP needs the package faster-coco-eval: pip install faster-coco-eval (or train without data.val)"
        )


def compressed(segmentation: Segmentation, size: tuple[int, int]) -> dict[str, Any]:
    """Polygons or run lengths as COCO's compressed run lengths, rasterised as its own code does.

    Args:
        segmentation: as ``segmentations.read_segmentation`` accepts it.
        size: height and width of the image.

    Returns:
        ``{"size": [height, width], "counts": "..."}``.
    """
    from faster_coco_eval.core import mask

    if isinstance(segmentation, Mapping) and isinstance(segmentation["counts"], (str, bytes)):
        counts = segmentation["counts"]
    elif isinstance(segmentation, Mapping):
        counts = mask.frPyObjects({**segmentation, "counts": list(segmentation["counts"])}, *size)["counts"]
    else:
        counts = mask.merge(mask.frPyObjects([list(one) for one in segmentation], *size))["counts"]
    return {
        "size": list(size),
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else str(counts),
    }


def numbers(images: Sequence[ImageResult], classes: int, kind: Kind, most: int = DETECTIONS[-1]) -> Numbers:
    """COCO's numbers of some results.

    Args:
        images: all of a set, by position: of equal scores the earlier image's comes first.
        classes: K, of the network; those without an object count nowhere.
        kind: ``segm`` and ``boundary`` need masks on both sides.
        most: ``eval.max_detections``: more than 100 take the place of COCO's 100 in all but ``ar100``.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    truth = COCO(_truth(images, classes, kind))
    evaluation = COCOeval_faster(truth, truth.loadRes(_found(images, kind)), kind)
    evaluation.params.maxDets = sorted({*DETECTIONS, max(most, DETECTIONS[-1])})
    evaluation.evaluate()
    evaluation.accumulate()
    labels: list[str] = evaluation.params.areaRngLbl
    detections: list[int] = evaluation.params.maxDets
    # IoU x recall x class x area x detections, and without recall; -1 where a class has no object.
    precision, recall = (
        np.where(values > -1, values, np.nan)
        for values in (
            np.asarray(evaluation.eval[name], dtype=np.float64) for name in ("precision", "recall")
        )
    )
    ious = np.asarray(evaluation.params.iouThrs)
    at50, at75 = (int(np.abs(ious - value).argmin()) for value in (0.5, 0.75))
    areas = [labels.index(name) for name in AREAS]
    counts = [detections.index(count) for count in DETECTIONS]
    values = (
        precision[..., _ALL, -1],
        precision[at50, ..., _ALL, -1],
        precision[at75, ..., _ALL, -1],
        *(precision[..., area, -1] for area in areas),
        *(recall[..., _ALL, count] for count in counts),
        *(recall[..., area, -1] for area in areas),
    )
    return Numbers(
        summary={name: float(_mean(each.reshape(-1), 0)) for name, each in zip(NAMES, values)},
        ap=_mean(precision[..., _ALL, -1], (0, 1)),
        ap50=_mean(precision[at50, ..., _ALL, -1], 0),
        ar=_mean(recall[..., _ALL, -1], 0),
    )


def _truth(images: Sequence[ImageResult], classes: int, kind: Kind) -> dict[str, Any]:
    annotations: list[dict[str, Any]] = []
    for image in images:
        truth = image.truth
        for i in range(len(truth)):
            one: dict[str, Any] = {
                # From 1 on: COCOeval's 0 is "matched to nothing".
                "id": len(annotations) + 1,
                "image_id": image.position,
                "category_id": int(truth.classes[i]),
                "bbox": truth.boxes[i].tolist(),
                "area": float(truth.area[i]),
                "iscrowd": int(truth.crowd[i]),
            }
            if kind != "bbox":
                one["segmentation"] = truth.segmentations[i]
            annotations.append(one)
    return {
        "images": [
            {"id": image.position, "height": image.size[0], "width": image.size[1]} for image in images
        ],
        "categories": [{"id": number, "name": str(number)} for number in range(classes)],
        "annotations": annotations,
    }


def _found(images: Sequence[ImageResult], kind: Kind) -> list[dict[str, Any]]:
    """Results in COCO's format; those of masks without a box, so that their area is the mask's."""
    found = []
    for image in images:
        for i, (number, score) in enumerate(zip(image.classes.tolist(), image.scores.tolist())):
            one: dict[str, Any] = {"image_id": image.position, "category_id": number, "score": score}
            if kind == "bbox":
                one["bbox"] = image.boxes[i].tolist()
            else:
                assert image.masks is not None
                one["segmentation"] = {"size": list(image.size), "counts": image.masks[i]}
            found.append(one)
    return found


def _mean(values: NDArray[np.float64], axis: int | tuple[int, ...]) -> Any:
    """Mean of what is there; NaN where nothing is."""
    there = ~np.isnan(values)
    count = there.sum(axis)
    total = np.where(there, values, 0.0).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
