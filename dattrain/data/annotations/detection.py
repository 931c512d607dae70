"""The objects of a network's classes that a sample's annotation says: what detection learns from and is measured by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dattrain.data.annotations import instances, rle
from dattrain.data.annotations.instances import Instances
from dattrain.data.source.index import NO_LABEL
from dattrain.data.source.sample import BadSample, Dataset


def detected(
    annotation: bytes,
    size: tuple[int, int],
    numbers: NDArray[np.int64] | None,
    where: str,
    *,
    masks: bool,
    training: bool = False,
) -> Instances:
    """The objects of an image, their ``classes`` being numbers of the network.

    In training degenerate ones (``instances.degenerate``), crowds and those marked ``ignore`` are left out, by mmdetection's rules
    (``CocoDataset.parse_data_info``; its assigners here make no use of crowds). An evaluation has all: on crowds detections are neither
    right nor wrong, degenerate ones and those marked ``ignore`` are objects like others, as in COCO's own.

    Args:
        annotation: ``Sample.annotation``: the JSON of objects that ``instances`` reads.
        size: height and width of the image as it was decoded.
        numbers: ``Dataset.numbers``, the network's class for each of the set's; None takes the set's own as they are.
        where: ``Sample.where``, for messages.
        masks: whether each must have one; a degenerate one that has none gets an empty one.
        training: whether they are to be learned from.

    Raises:
        BadSample: no objects, an annotation or mask of another size than the image, an object of the background or of a class that
            the set does not name, or without the mask that is asked for.
    """
    if not annotation:
        raise BadSample(f"{where}: has no annotation")
    found = instances.check(annotation, size, None, where)
    why, segmentations = found.degenerate(size), list(found.segmentations)
    classes, keep = found.classes.copy(), np.ones(len(found), dtype=np.bool_)
    for i, own in enumerate(found.classes.tolist()):
        what = f"{where}: object {i} of its annotation"
        if numbers is not None:
            classes[i] = _number(own, numbers, what)
        if masks and segmentations[i] is None:
            if not why[i]:
                raise BadSample(
                    f"{what} has a box and no mask; masks are learned from, by this task.head or geometry.copy_paste"
                )
            segmentations[i] = {"size": list(size), "counts": rle.to_string([size[0] * size[1]])}
        if training and (why[i] or found.crowd[i] or i in found.ignored):
            keep[i] = False
    return replace(
        found,
        boxes=found.boxes[keep],
        classes=classes[keep],
        area=found.area[keep],
        crowd=found.crowd[keep],
        segmentations=tuple(segmentations[i] for i in np.flatnonzero(keep).tolist()),
        ignored=frozenset(new for new, i in enumerate(np.flatnonzero(keep).tolist()) if i in found.ignored),
    )


def category_ids(dataset: Dataset, count: int) -> list[int | None]:
    """What a set's own file calls each of the network's ``count`` classes, by class number: for results in the file's own ids.

    ``Dataset.category_ids`` after ``Dataset.renumber``; None for a class that the file does not have. A set that does not say has the
    numbers of its own classes for ids: those of a packed set count the background as 0, so 1, 2, ...
    """
    own: Sequence[int | None] | None = dataset.category_ids
    if dataset.numbers is None or dataset.classes is None:
        return list(range(count))
    ids: list[int | None] = [None] * count
    for index, number in enumerate(dataset.numbers.tolist()):
        if number != NO_LABEL:
            ids[number] = index if own is None else own[index]
    return ids


def _number(own: int, numbers: NDArray[np.int64], what: str) -> int:
    if 0 <= own < len(numbers) and numbers[own] != NO_LABEL:
        return int(numbers[own])
    names = f"there are {len(numbers)} classes of its set (else model.num_classes), 0 to {len(numbers) - 1}"
    if own == 0 and len(numbers):
        raise BadSample(
            f"{what} has class 0, which is the background of its set; in detection an object is of another"
        )
    if 0 <= own < len(numbers):
        raise BadSample(
            f"{what} has class {own}, of which the set's manifest counts no samples; pack the set again"
        )
    raise BadSample(f"{what} has class {own}, but {names}")
