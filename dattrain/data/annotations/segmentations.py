"""The segmentation of an object as COCO's files have it: its forms, its pixels, its box and its area."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dattrain.data.annotations import polygons, rle
from dattrain.data.decode import images
from dattrain.data.source.sample import BadSample

FAR = 8 * images.MAX_SIDE
"""Pixels; corners and boxes beyond are none, and walking to such corners would take memory."""

Segmentation = Sequence[Sequence[float]] | Mapping[str, Any]
"""Polygons, or run lengths: a compressed string (or its bytes), or a list."""


def read_segmentation(value: object, where: str) -> Segmentation | None:
    """A segmentation as COCO's files have it; None where there is none, as an empty list is.

    Polygons of fewer than three corners cover nothing and are left out. Raises BadSample for anything else.
    """
    if value is None or value == [] or value == {}:
        return None
    if isinstance(value, Mapping):
        _runs(value, where)
        return value
    if isinstance(value, list) and set(map(type, value)) <= {int, float}:
        value = [value]  # one polygon that is not in a list of its own
    if not isinstance(value, list) or not all(_is_polygon(one) for one in value):
        raise BadSample(f"{where} has the segmentation {_short(value)}, neither polygons nor run lengths")
    return [one for one in value if len(one) >= 6] or None


def stored(segmentation: Segmentation, where: str) -> Segmentation:
    """A segmentation as it is kept: polygons as they are, run lengths of any form compressed. Raises BadSample."""
    if not isinstance(segmentation, Mapping):
        return segmentation
    counts, (height, width) = _runs(segmentation, where)
    return {"size": [height, width], "counts": rle.to_string(counts)}


def mask(
    segmentation: Segmentation, size: tuple[int, int], where: str, part: tuple[slice, slice] | None = None
) -> NDArray[np.bool_]:
    """The pixels of an object, H x W, or those of a part of the image.

    Args:
        size: height and width of the image.
        part: rows and columns, within the image; nothing of that size but the part is made of polygons, and its columns of run lengths.

    Raises:
        BadSample: run lengths of another size, or what is no segmentation.
    """
    rows, columns = part or (slice(0, size[0]), slice(0, size[1]))
    if isinstance(segmentation, Mapping):
        counts, own = _runs(segmentation, where)
        _check_same(own, size, where)
        return rle.decode(counts, *size, columns)[rows]
    found = np.zeros((rows.stop - rows.start, columns.stop - columns.start), dtype=np.bool_)
    for polygon in segmentation:
        corners = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
        polygons.paint(found, corners, (rows.start, columns.start))
    return found


def check_size(segmentation: Segmentation, size: tuple[int, int], where: str) -> None:
    """Raise BadSample where run lengths are of another size than the image (height and width)."""
    if isinstance(segmentation, Mapping):
        _check_same(_runs(segmentation, where)[1], size, where)


def _check_same(own: tuple[int, int], size: tuple[int, int], where: str) -> None:
    if own != size:
        raise BadSample(
            f"{where}: its mask has {own[1]} x {own[0]} pixels, its image {size[1]} x {size[0]}; both must be of one size"
        )


def box_of(segmentation: Segmentation) -> tuple[float, ...]:
    """x, y, width and height of the smallest box around a segmentation that ``read_segmentation`` accepted; zeros for an empty one."""
    if isinstance(segmentation, Mapping):
        counts, (height, width) = _runs(segmentation, "")
        ys, xs = np.nonzero(rle.decode(counts, height, width))
        if not len(xs):
            return (0.0, 0.0, 0.0, 0.0)
        low, high = np.array([xs.min(), ys.min()]), np.array([xs.max() + 1, ys.max() + 1])
    else:
        corners = np.concatenate([np.asarray(one, dtype=np.float64).reshape(-1, 2) for one in segmentation])
        low, high = corners.min(axis=0), corners.max(axis=0)
    return (*map(float, low), *map(float, high - low))


def area_of(segmentation: Segmentation | None, box: Sequence[float]) -> float:
    """Pixels of an object that does not say its area: of its mask, else of its box.

    Polygons are taken for apart and without crossings: where they overlap, pixels count twice.
    """
    if segmentation is None:
        return box[2] * box[3]
    if isinstance(segmentation, Mapping):
        return float(_runs(segmentation, "")[0][1::2].sum())
    corners = (np.asarray(one, dtype=np.float64).reshape(-1, 2) for one in segmentation)
    return sum(map(polygons.area, corners)) or box[2] * box[3]


def _is_polygon(value: object) -> bool:
    # Millions of them are looked at where a COCO file is opened, so nothing here is a loop of Python's.
    return isinstance(value, list) and (
        not value
        or (
            len(value) % 2 == 0
            and set(map(type, value)) <= {int, float}
            and math.isfinite(sum(value))
            and -FAR < min(value) <= max(value) < FAR
        )
    )


def _runs(segmentation: Mapping[str, Any], where: str) -> tuple[NDArray[np.int64], tuple[int, int]]:
    """Run lengths and the mask's height and width."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if (
        not isinstance(size, (list, tuple))
        or len(size) != 2
        or not all(type(x) is int and x > 0 for x in size)
    ):
        raise BadSample(f"{where} has run lengths of the size {_short(size)}, not height and width")
    try:
        if isinstance(counts, (str, bytes)):
            # What str() made of bytes, as json.dumps(default=str) writes them.
            text = counts[2:-1] if isinstance(counts, str) and counts[:2] in ("b'", 'b"') else counts
            if text is not counts:
                assert isinstance(text, str)
                text = text.replace("\\\\", "\\")
            runs = rle.from_string(text)
        elif isinstance(counts, list) and all(type(x) is int for x in counts):
            runs = np.asarray(counts, dtype=np.int64)
        else:
            raise ValueError(f"counts {_short(counts)}")
        if (runs < 0).any() or runs.sum() != size[0] * size[1]:
            raise ValueError(f"run lengths of {int(runs.sum())} pixels, for a mask of {size[1]} x {size[0]}")
        if size[0] * size[1] > images.MAX_PIXELS:
            raise ValueError(
                f"a mask of {size[1]} x {size[0]} pixels; the limit is {images.MAX_PIXELS} in all"
            )
    except (ValueError, OverflowError) as error:
        raise BadSample(f"{where} has a segmentation that cannot be read ({error})") from error
    return runs, (size[0], size[1])


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
