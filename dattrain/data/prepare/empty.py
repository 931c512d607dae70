"""Finding the images that detectors are usually not trained on: those without objects, and tiny ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dattrain.data.annotations import instances
from dattrain.data.annotations.annotated import AnnotatedFiles
from dattrain.data.decode import images
from dattrain.data.source.dataset import BadSample, Dataset, locate
from dattrain.data.workers import Workers

MIN_SIDE = 32
"""Pixels: the default ``min_size`` of mmdetection's ``CocoDataset`` filter."""
EMPTY, SMALL = "no objects", f"a shorter side below {MIN_SIDE} pixels"
_CHUNK = 1024


def find_empty(source: Dataset, *, jobs: int = 1) -> tuple[NDArray[np.bool_], list[dict[str, str]]]:
    """Which samples of a set of objects have none, or an image that is too small, as mmdetection's ``filter_empty_gt`` leaves them out.

    A crowd is an object here, as it is there; a degenerate one (``instances.degenerate``) is none. What cannot be read stays, for packing to report.

    Returns:
        One bool per sample, numbered through the whole source; and ``key`` and ``reason`` (``EMPTY`` or ``SMALL``) of each that is found.
    """
    total = int(source.counts.sum())

    def work(number: int) -> list[tuple[int, str]]:
        found = []
        for item in range(number * _CHUNK, min(total, (number + 1) * _CHUNK)):
            if why := _why(source, *locate(source, item)):
                found.append((item, why))
        return found

    dropped: NDArray[np.bool_] = np.zeros(total, dtype=np.bool_)
    rows = []
    with Workers(work, count=-(-total // _CHUNK), workers=jobs if jobs > 1 else 0) as workers:
        for part in workers:
            for item, why in part:
                dropped[item] = True
                rows.append({"key": source.key(*locate(source, item)), "reason": why})
    return dropped, rows


def _why(source: Dataset, shard: int, sample: int) -> str:
    """Why a sample is left out; empty where it is not."""
    try:
        size = source.image_size(shard, sample)
        data = b""
        if isinstance(source, AnnotatedFiles) and all(size):
            annotation = source.annotation(sample)
        else:
            found = source.read(shard, sample)
            annotation, data = found.annotation, found.data
        size = size if all(size) else images.size(data)
        if all(instances.parse(annotation, "").degenerate(size)):
            return EMPTY
        return SMALL if min(size) < MIN_SIDE else ""
    except (BadSample, images.BadImage):
        return ""
