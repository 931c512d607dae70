"""What the annotations of a packed set hold, counted while they are written: which classes occur, and what teaches nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dattrain.data.annotations import instances
from dattrain.data.annotations.maps import VOID
from dattrain.data.classes import few
from dattrain.data.source.index import to_json
from dattrain.files import counted

ONLY_DETECTION = "detection can learn from them, segmentation cannot"
"""Said of objects with a box and no mask."""


@dataclass(frozen=True)
class Contents:
    """Counts over samples; ``+`` adds those of others.

    Attributes:
        histogram: samples that have a class, by its number; of objects, all have the background.
        crowds: those of ``histogram`` in which all objects of that class are crowds (or degenerate).
        pixels, void: of maps, in all and of no class.
        void_alone: samples whose map is void everywhere; ``first_void`` is one.
        boxes: objects but degenerate ones with a box and no mask; ``first_box`` is one.
    """

    histogram: Counter[int] = field(default_factory=Counter)
    crowds: Counter[int] = field(default_factory=Counter)
    pixels: int = 0
    void: int = 0
    void_alone: int = 0
    first_void: str = ""
    boxes: int = 0
    first_box: str = ""

    @classmethod
    def of_map(cls, numbers: NDArray[np.uint8], name: str) -> Contents:
        """Of a map, H x W, of the sample of that name."""
        counts = np.bincount(numbers.ravel(), minlength=VOID + 1)
        void = int(counts[VOID])
        alone = void == numbers.size
        return cls(
            Counter(np.flatnonzero(counts[:VOID]).tolist()),
            pixels=numbers.size,
            void=void,
            void_alone=int(alone),
            first_void=name if alone else "",
        )

    @classmethod
    def of_objects(cls, annotation: bytes, background: int, name: str) -> Contents:
        """Of a sample's JSON. Raises BadSample."""
        found = instances.parse(annotation, name)
        whole = np.asarray([not why for why in found.degenerate(found.size)], dtype=np.bool_)
        without = [i for i in np.flatnonzero(whole).tolist() if found.segmentations[i] is None]
        first = f"object {without[0]} of {name}" if without else ""
        crowds = set(found.classes[found.crowd].tolist()) - set(found.classes[whole & ~found.crowd].tolist())
        return cls(
            Counter({background, *found.classes.tolist()}),
            Counter(crowds),
            boxes=len(without),
            first_box=first,
        )

    @classmethod
    def of_json(cls, data: bytes) -> Contents:
        """What ``to_json`` made. Raises ValueError, KeyError, TypeError, AttributeError for anything else."""
        content = json.loads(data)
        histogram, crowds = (
            Counter({int(number): int(count) for number, count in content.pop(name).items()})
            for name in ("histogram", "crowds")
        )
        return cls(histogram, crowds, **content)

    def to_json(self) -> bytes:
        """For ``of_json``."""
        return to_json(vars(self))

    def __add__(self, other: Contents) -> Contents:
        return Contents(
            self.histogram + other.histogram,
            self.crowds + other.crowds,
            self.pixels + other.pixels,
            self.void + other.void,
            self.void_alone + other.void_alone,
            self.first_void or other.first_void,
            self.boxes + other.boxes,
            self.first_box or other.first_box,
        )

    @property
    def maskless(self) -> str:
        """See ``Dataset.maskless``."""
        return instances.maskless(self.boxes, self.first_box)

    def lines(self, classes: Sequence[str] | None) -> list[str]:
        """What whoever packed should know: void, classes that never occur, boxes alone."""
        out = []
        if self.void:
            out.append(
                f"{self.void / self.pixels:.1%} of the pixels are void"
                + (
                    f"; {counted(self.void_alone, 'sample')} {'holds' if self.void_alone == 1 else 'hold'} nothing else: {self.first_void}"
                    if self.void_alone
                    else ""
                )
            )
        absent = [name for number, name in enumerate(classes or ()) if number not in self.histogram]
        if absent:
            # The background of objects is no class that could be missing.
            known = len(classes or ()) - (self.pixels == 0)
            out.append(f"{len(absent):,} of {counted(known, 'class')} never occur: {few(absent)}")
        crowds = [
            name
            for number, name in enumerate(classes or ())
            if 0 < self.crowds[number] == self.histogram[number]
        ]
        if crowds:
            out.append(f"of {few(crowds)} there are crowds alone, which are void as a map")
        if self.void and absent and self.histogram.keys() == {0}:
            out.append(
                f"its maps hold 0 and {VOID} alone, one class and void; where {VOID} is meant as a class, write 1"
            )
        if self.boxes:
            out.append(f"{self.maskless}; {ONLY_DETECTION}")
        return out
