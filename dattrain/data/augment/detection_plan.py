"""What is drawn for images of detection: what ``dense_plan`` draws, and short side, first crop and what is pasted in.

A sample's draws are a function of (seed, stream, position) alone; whose objects are pasted in is one of these and of the update's positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dattrain.config.data_sections import Augment, Geometry
from dattrain.data.augment import dense_plan
from dattrain.data.augment.dense_plan import DensePlan, crop_window, resized_size
from dattrain.data.augment.placement import Placement
from dattrain.data.philox import Stream, uniform

NOBODY = -1
"""In place of a partner."""


@dataclass(frozen=True)
class DetectionPlan:
    """The drawn augmentation of B samples, and of P more whose objects are pasted into some of those.

    Attributes:
        dense: of B + P: scale, place of the crop, flip and distortion.
        short_side: B + P int64, pixels of the shorter side after the resize.
        precrop: B + P bool: whether a resize and a crop come before all.
        precrop_short_side: B + P int64, pixels of the shorter side after that resize.
        precrop_sides: least and most pixels of the height and of the width of that crop.
        precrop_draw: B + P x 4 float64 in (0, 1): its height, its width, and where it begins from the top and from the left.
        partner: B int64, row of the sample whose objects are pasted in, ``NOBODY`` for none.
        seed: of what is drawn for each object.
        positions: B + P int64, global.
    """

    dense: DensePlan
    short_side: NDArray[np.int64]
    precrop: NDArray[np.bool_]
    precrop_short_side: NDArray[np.int64]
    precrop_sides: tuple[int, int]
    precrop_draw: NDArray[np.float64]
    partner: NDArray[np.int64]
    seed: int
    positions: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.partner)

    def placement(self, sample: int, height: int, width: int) -> Placement:
        """Where the pixels of a sample that is stored with that height and width come to lie.

        The first crop and the resize after it are one: the crop is rounded to stored pixels and resized once.
        """
        dense = self.dense
        rows, columns = slice(0, height), slice(0, width)
        if self.precrop[sample]:
            rows, columns = self._precrop(sample, height, width)
        size = resized_size(
            rows.stop - rows.start,
            columns.stop - columns.start,
            short_side=int(self.short_side[sample]),
            long_side=dense.long_side,
            scale=float(dense.scale[sample]),
        )
        box = rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start
        window = crop_window(size, dense.crop or size, dense.place[sample, 0].tolist())
        return Placement(box, size, *window, bool(dense.flip[sample]))

    def _precrop(self, sample: int, height: int, width: int) -> tuple[slice, slice]:
        """Rows and columns of the first crop, in stored pixels."""
        side = int(self.precrop_short_side[sample])
        size = resized_size(height, width, short_side=side, long_side=self.dense.long_side)
        draws = self.precrop_draw[sample].tolist()
        least, most = (tuple(min(limit, side) for side in size) for limit in self.precrop_sides)
        crop = tuple(low + _below(u, high - low + 1) for u, low, high in zip(draws, least, most))
        window = crop_window(size, (crop[0], crop[1]), draws[2:])
        edges = [
            (round(part.start * old / new), round(part.stop * old / new))
            for part, old, new in zip(window, (height, width), size)
        ]
        rows, columns = (
            slice(min(start, old - 1), max(stop, start + 1))
            for (start, stop), old in zip(edges, (height, width))
        )
        return rows, columns

    def pasted(self, sample: int, count: int) -> NDArray[np.int64]:
        """Which of its partner's ``count`` objects are pasted into a sample: some, all or none, each number of them as likely.

        As mmdetection's CopyPaste draws the random subset of Ghiasi et al.
        """
        # The first draws are the same for any count.
        draws = uniform(self.seed, Stream.PASTED, self.positions[sample : sample + 1], 1 + count)[0]
        chosen = np.argsort(draws[1:], kind="stable")[: _below(float(draws[0]), count + 1)]
        return np.sort(chosen)


def draw(
    geometry: Geometry,
    augment: Augment,
    seed: int,
    positions: ArrayLike,
    partner: NDArray[np.int64] | None = None,
) -> DetectionPlan:
    """Draw the plan of the samples at ``positions`` (B + P int64, global).

    Multi-scale training with a first crop is DETR's (Carion et al., ECCV 2020), which Swin's and DAT's detectors were trained with;
    ``scale`` with a crop is large-scale jitter (Ghiasi et al., CVPR 2021).

    Args:
        partner: of B samples, as ``with_partners`` gives it with ``positions``; None has none.
    """
    at = np.asarray(positions, dtype=np.int64)
    sides = np.asarray(geometry.short_sides or (geometry.short_side,), dtype=np.int64)
    first = np.asarray(geometry.precrop_short_sides or (geometry.short_side,), dtype=np.int64)
    drawn = uniform(seed, Stream.PRECROP, at, 6)
    return DetectionPlan(
        dense=dense_plan.draw(geometry, augment, seed, at),
        short_side=sides[_pick(uniform(seed, Stream.SHORT_SIDE, at, 1)[:, 0], len(sides))],
        precrop=drawn[:, 0] < geometry.precrop,
        precrop_short_side=first[_pick(drawn[:, 1], len(first))],
        precrop_sides=geometry.precrop_sides,
        precrop_draw=drawn[:, 2:],
        partner=np.full(len(at), NOBODY) if partner is None else partner,
        seed=seed,
        positions=at,
    )


def with_partners(
    positions: NDArray[np.int64], probability: float, seed: int, seen: int, global_batch: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The positions that a micro-batch needs, and for each of its own the row of the one whose objects are pasted in.

    That is any other one of the update, whoever trains on it.

    Args:
        positions: B int64, of the update that has ``seen`` to ``seen + global_batch``.
        probability: ``geometry.copy_paste``.

    Returns:
        The B positions, then those P partners that are not among them; B int64 rows of these, or ``NOBODY``.
    """
    happens, which = uniform(seed, Stream.PASTE, positions, 2).T
    away = 1 + _pick(which, global_batch - 1)
    wanted = seen + (positions - seen + away) % global_batch
    wanted = wanted[happens < probability]
    needed = list(dict.fromkeys([*positions.tolist(), *wanted.tolist()]))
    row = {position: i for i, position in enumerate(needed)}
    partner = np.full(len(positions), NOBODY)
    partner[happens < probability] = [row[position] for position in wanted.tolist()]
    return np.asarray(needed, dtype=np.int64), partner


def _pick(draws: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Whole numbers below ``count`` of draws from (0, 1)."""
    # A draw is below 1, but times a whole number it may round up to that number.
    return np.minimum((draws * count).astype(np.int64), count - 1)


def _below(draw: float, count: int) -> int:
    return min(int(draw * count), count - 1)
