"""The part of a shard's index that only annotated samples have: where their annotations lie, and the sizes of their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dattrain.data.source.tar import BLOCK

Annotations = Literal["none", "maps", "instances"]
"""What lies beside the images of a set: nothing, a map of class numbers each, or the objects in each."""
ANNOTATIONS = frozenset(get_args(Annotations))


@dataclass(frozen=True)
class AnnotationIndex:
    """Where the annotations of a shard's n samples lie.

    Attributes:
        kind: of all of them.
        offsets: n int64, of the annotation's first byte in the tar; 0 where the sample has none.
        lengths: n int64, bytes of it.
        heights, widths: n int64, pixels of the image; 0 where its header cannot be read.
    """

    kind: Annotations
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    heights: NDArray[np.int64]
    widths: NDArray[np.int64]

    @classmethod
    def build(cls, kind: Annotations, rows: Sequence[tuple[int, int, int, int]]) -> AnnotationIndex:
        """From (offset, length, height, width) of each sample."""
        table = np.asarray(rows, dtype=np.int64).reshape(-1, 4)
        return cls(kind, *(np.ascontiguousarray(column) for column in table.T))

    def arrays(self) -> dict[str, Any]:
        """What an index file holds of it, by name."""
        return {
            "annotations": np.frombuffer(self.kind.encode(), dtype=np.uint8),
            "annotation_offsets": self.offsets,
            "annotation_lengths": self.lengths,
            "heights": self.heights,
            "widths": self.widths,
        }

    @classmethod
    def of_arrays(cls, file: Mapping[str, Any]) -> AnnotationIndex:
        """From what an index file holds. Raises ValueError, KeyError."""
        kind = as_annotations(file["annotations"].tobytes().decode())
        names = ("annotation_offsets", "annotation_lengths", "heights", "widths")
        return cls(kind, *(file[name] for name in names))

    def consistent(self, n: int, size: int) -> bool:
        """Whether it can be that of a shard of n samples in ``size`` bytes."""
        rows = (self.offsets, self.lengths, self.heights, self.widths)
        return bool(
            all(row.dtype == np.int64 and row.shape == (n,) and row.min(initial=0) >= 0 for row in rows)
            and (self.lengths <= size - self.offsets).all()
            and (self.offsets[self.offsets > 0] >= BLOCK).all()
        )


def as_annotations(kind: object) -> Annotations:
    """A kind of annotations that a file names. Raises ValueError for another."""
    if kind not in ANNOTATIONS:
        raise ValueError(f"annotations {kind!r}, this version reads {', '.join(sorted(ANNOTATIONS))}")
    return kind  # type: ignore[return-value]
