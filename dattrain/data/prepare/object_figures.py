"""Figures of the objects of a set: how large, how many in an image, and what detection does not learn from."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dattrain.data.annotations.instances import UNLEARNED, Instances
from dattrain.files import counted

MEDIUM, LARGE = 32**2, 96**2
"""Pixels of area from which an object is medium and large: COCO's (``COCOeval.params.areaRng``)."""
_BORDER = 1.0
"""Pixels beyond the image that are rounding: boxes of COCO's own files have as much."""


@dataclass(frozen=True)
class ObjectFigures:
    """Figures of images; ``+`` adds those of others.

    Attributes:
        images, without: all, and those without objects that are not degenerate.
        objects, most: but degenerate ones in all, and of the image with most, crowds among them.
        small, medium, large: objects but crowds, by area.
        beyond: others whose boxes end more than a pixel beyond their image; ``first_beyond`` is the sample of one.
        ignored: objects marked ``ignore``.
        degenerate: objects that training leaves out (``instances.degenerate``), by the reason; ``first`` is the sample of one of each.
    """

    images: int = 0
    without: int = 0
    objects: int = 0
    most: int = 0
    small: int = 0
    medium: int = 0
    large: int = 0
    beyond: int = 0
    first_beyond: str = ""
    ignored: int = 0
    degenerate: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Instances, size: tuple[int, int], name: str) -> ObjectFigures:
        """Of an image of that height and width, the sample of that name."""
        reasons = found.degenerate(size)
        counts = Counter(why for why in reasons if why)
        whole = np.asarray([not why for why in reasons], dtype=np.bool_)
        area, total = found.area[whole & ~found.crowd], int(whole.sum())
        boxes: NDArray[np.float64] = found.boxes
        limit = np.asarray([size[1], size[0]], dtype=np.float64) + _BORDER
        outside = (boxes[:, :2] < -_BORDER) | (boxes[:, :2] + boxes[:, 2:] > limit)
        beyond = int((outside.any(axis=1) & whole).sum())
        return cls(
            1,
            int(not total),
            total,
            total,
            int((area < MEDIUM).sum()),
            int(((area >= MEDIUM) & (area < LARGE)).sum()),
            int((area >= LARGE).sum()),
            beyond,
            name if beyond else "",
            len(found.ignored),
            counts,
            dict.fromkeys(counts, name),
        )

    def __add__(self, other: ObjectFigures) -> ObjectFigures:
        return ObjectFigures(
            self.images + other.images,
            self.without + other.without,
            self.objects + other.objects,
            max(self.most, other.most),
            self.small + other.small,
            self.medium + other.medium,
            self.large + other.large,
            self.beyond + other.beyond,
            self.first_beyond or other.first_beyond,
            self.ignored + other.ignored,
            self.degenerate + other.degenerate,
            {**other.first, **self.first},
        )

    def sizes(self) -> list[str]:
        """How large and how many, as text."""
        total = max(1, self.small + self.medium + self.large)
        mean = self.objects / max(1, self.images)
        return [
            f"per image    {mean:.1f} objects in the mean, {self.most:,} at most; {counted(self.without, 'image')} without any",
            f"areas        {self.small / total:.1%} small (below 32 x 32), {self.medium / total:.1%} medium, "
            f"{self.large / total:.1%} large (from 96 x 96 on), by COCO's limits and without crowds",
        ]

    def oddities(self) -> list[str]:
        """What training leaves out or cuts, a line each; nothing where there is none."""
        out = [
            f"{counted(count, 'object')} with {why} (in {self.first[why]}): {UNLEARNED}"
            for why, count in sorted(self.degenerate.items())
        ]
        if self.ignored:
            out.append(
                f"{counted(self.ignored, 'object')} marked `ignore`: detection does not learn from them"
            )
        if self.beyond:
            out.append(
                f"{counted(self.beyond, 'object')} with a box that ends more than a pixel beyond the image's border (in {self.first_beyond}): "
                "cut there in training"
            )
        return out
