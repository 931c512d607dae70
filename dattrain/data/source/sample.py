"""What a data set is: samples by number, each an encoded image with a class number."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dattrain.data.source.annotation_index import Annotations
from dattrain.data.source.index import NO_LABEL
from dattrain.errors import UserError
from dattrain.urls import mask


class BadSample(Exception):
    """One sample that cannot be used. The message names shard, key and offset, and says why."""

    def __init__(self, message: str) -> None:
        super().__init__(mask(message))


@dataclass(frozen=True, slots=True)
class Sample:
    """Where a sample is, and what it holds.

    ``key`` is ``shard:key``; ``where`` adds the offset; ``label`` may be ``NO_LABEL``; ``data`` is the encoded image;
    ``annotation`` is what ``dattrain.data.annotations`` reads, empty in a set without annotations.
    """

    key: str
    where: str
    label: int
    data: bytes
    annotation: bytes = b""


class Dataset(Protocol):
    """Samples addressed by (shard, sample)."""

    name: str
    counts: NDArray[np.int64]
    """Samples per shard."""
    max_label: int
    """Largest label, or ``NO_LABEL`` where it is not known without reading every index."""
    classes: Sequence[str] | None
    """Names of the set's own labels 0, 1, ...; None where its labels are bare numbers."""
    used: Collection[int] | None
    """Those of the set's own labels that have samples; None where all have, or nothing says."""
    notes: Sequence[str]
    """What was left out, or looks odd: one line each, for whoever opened the set to print."""
    flaws: Sequence[str]
    """Why samples are missing or will be bad, as far as opening the set tells: one line each. Who leaves out no bad samples refuses it."""
    maskless: str
    """Which of its objects have a box and no mask, in words; empty where none has, or nothing says."""
    grounds: str
    """Which of its objects are of the background, in words; empty where none is, or nothing says."""
    prefetches: bool
    """Whether ``prefetch`` does anything."""
    annotations: Annotations
    """What its samples hold beside the image; with any, ``classes`` are those of pixels or objects, and there are no labels."""
    numbers: NDArray[np.int64] | None
    """What ``renumber`` was given: class numbers by the set's own; None before."""
    category_ids: Sequence[int | None] | None
    """Of objects: what the file that the set was made of calls the classes of ``classes`` (COCO's ``category_id``), None for the
    background and where it has no such category; None where nothing says."""

    def key(self, shard: int, sample: int) -> str:
        """``shard:key`` of a sample."""
        ...

    def label(self, shard: int, sample: int) -> int:
        """Label of a sample, or ``NO_LABEL``."""
        ...

    def read(self, shard: int, sample: int) -> Sample:
        """The encoded image. Raises BadSample for a sample without image, UserError for a damaged shard."""
        ...

    def image_size(self, shard: int, sample: int) -> tuple[int, int]:
        """Height and width of a sample's image as ``read`` gives it, told without reading it; zeros where nothing says."""
        ...

    def renumber(self, numbers: NDArray[np.int64]) -> None:
        """Give the set's labels the class numbers of a network, which ``label`` and ``read`` return from now on.

        ``numbers`` are those of ``Classes.numbers``, and ``NO_LABEL`` for labels without samples.
        ``classes`` stays.
        """
        ...

    def prefetch(self, shards: Sequence[int]) -> None:
        """Take the hint that these shards are read next."""
        ...

    def close(self) -> None:
        """Release files."""
        ...


class BaseDataset:
    """What most data sets share: class numbers for labels of their own, and nothing to prefetch or to close."""

    max_label: int = NO_LABEL
    classes: Sequence[str] | None = None
    used: Collection[int] | None = None
    notes: Sequence[str] = ()
    flaws: Sequence[str] = ()
    maskless: str = ""
    grounds: str = ""
    prefetches: bool = False
    annotations: Annotations = "none"
    numbers: NDArray[np.int64] | None = None
    category_ids: Sequence[int | None] | None = None

    def image_size(self, shard: int, sample: int) -> tuple[int, int]:
        """See ``Dataset.image_size``."""
        return 0, 0

    def prefetch(self, shards: Sequence[int]) -> None:
        """See ``Dataset.prefetch``."""

    def close(self) -> None:
        """See ``Dataset.close``."""

    def renumber(self, numbers: NDArray[np.int64]) -> None:
        """See ``Dataset.renumber``."""
        self.numbers = numbers
        self.max_label = int(numbers.max(initial=NO_LABEL))

    def _number(self, label: int, where: str) -> int:
        """The class number of one of the set's own labels."""
        named = self.classes if self.numbers is None else self.numbers
        if named is None or label == NO_LABEL:
            return label
        if not 0 <= label < len(named):
            raise UserError(f"{where}: has label {label}, but its set names {len(named)} classes")
        if self.numbers is None:
            return label
        number = int(self.numbers[label])
        if number == NO_LABEL:
            raise UserError(
                f"{where}: has label {label}, of which its manifest counts no samples; pack the set again"
            )
        return number
