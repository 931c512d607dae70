"""The map of a network's classes that a sample's annotation says: what semantic segmentation learns from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dattrain.data.annotations import instances, maps
from dattrain.data.annotations.maps import VOID
from dattrain.data.source.index import NO_LABEL
from dattrain.data.source.sample import BadSample

__all__ = ["VOID", "annotated_size", "semantic_map"]


def semantic_map(
    annotation: bytes, size: tuple[int, int], numbers: NDArray[np.int64] | None, where: str
) -> NDArray[np.uint8]:
    """The class of each pixel, H x W; ``VOID`` where there is none, and where objects overlap or are a crowd.

    Pixels of no object have the set's class 0, the background.

    Args:
        annotation: ``Sample.annotation``: a PNG of the set's own class numbers, or the JSON of objects that ``instances`` reads.
        size: height and width of the image as it was decoded.
        numbers: ``Dataset.numbers``, the network's class for each of the set's; None takes the set's own as they are.
        where: ``Sample.where``, for messages.

    Raises:
        BadSample: no annotation, one that does not decode or of another size than the image, a class that the set does not
            name, or an object without mask.
    """
    if not annotation:
        raise BadSample(f"{where}: has no annotation")
    if _is_json(annotation):
        objects = instances.check(annotation, size, None, where)
        return instances.painted(objects, size, numbers, where, VOID)
    head = maps.header(annotation)
    if head is not None:
        _check_size((head.height, head.width), size, where)
    found = maps.read(annotation, where)
    return found if numbers is None else _numbered(found, numbers, where)


def annotated_size(annotation: bytes) -> tuple[int, int] | None:
    """Height and width of the image as whoever annotated it saw it; None where that is not said, or cannot be read."""
    if _is_json(annotation):
        return instances.size_of(annotation)
    head = maps.header(annotation)
    return None if head is None else (head.height, head.width)


def _is_json(annotation: bytes) -> bool:
    return annotation[:64].removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"


def _check_size(own: tuple[int, int], size: tuple[int, int], where: str) -> None:
    if own != size:
        raise BadSample(
            f"{where}: its annotation has {own[1]} x {own[0]} pixels, its image {size[1]} x {size[0]}; both must be of one size"
        )


def _numbered(own: NDArray[np.uint8], numbers: NDArray[np.int64], where: str) -> NDArray[np.uint8]:
    """The network's numbers for the set's own. Raises BadSample for one that is not in the table."""
    table = np.full(256, NO_LABEL, dtype=np.int64)
    table[: len(numbers)] = numbers[:256]
    table[VOID] = VOID
    found = table[own]
    if found.min(initial=0) < 0:
        y, x = (int(place[0]) for place in np.nonzero(found == NO_LABEL))
        raise BadSample(
            f"{where}: its map has class {own[y, x]} at x={x}, y={y}, but there are {len(numbers)} classes (those of its set, else model.num_classes): 0 to "
            f"{len(numbers) - 1} are right, and {VOID} where there is none"
        )
    return found.astype(np.uint8)
