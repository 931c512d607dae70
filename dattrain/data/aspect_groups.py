"""Lying and standing images apart, as they are in training: which slots of an update share a micro-batch, so that less of it is padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def grouped(standing: NDArray[np.bool_], micro_batch: int) -> NDArray[np.int64]:
    """The slots of an update in another order, of which each ``micro_batch`` in turn are all lying or all standing, but for one such.

    Slots are gone through in their order, and a micro-batch is made as soon as there are enough of a kind (detectron2's
    ``AspectRatioGroupedDataset``); so most stay near their places, and a rank near the shards that it reads. Those left at the
    end of an update, fewer than a micro-batch of each kind, are one together.

    Args:
        standing: G bool, whether the image of each slot is higher than wide.
        micro_batch: divides G.
    """
    waiting: dict[bool, list[int]] = {False: [], True: []}
    order: list[int] = []
    for slot, kind in enumerate(standing.tolist()):
        waiting[kind].append(slot)
        if len(waiting[kind]) == micro_batch:
            order += waiting[kind]
            waiting[kind] = []
    return np.asarray([*order, *waiting[False], *waiting[True]], dtype=np.int64)


def padded_shares(updates: Sequence[NDArray[np.int64]], micro_batch: int, pad_to: int) -> tuple[float, float]:
    """Share of the pixels of micro-batches that are padding: with lying and standing images apart, and in the order that is given.

    Args:
        updates: height and width of the images of each update (G x 2).
        micro_batch: divides G.
        pad_to: sides are rounded up to a multiple of this.
    """
    apart = [sizes[grouped(sizes[:, 0] > sizes[:, 1], micro_batch)] for sizes in updates]
    return _padded_share(np.concatenate(apart), micro_batch, pad_to), _padded_share(
        np.concatenate(updates), micro_batch, pad_to
    )


def _padded_share(sizes: NDArray[np.int64], micro_batch: int, pad_to: int) -> float:
    batches = sizes.reshape(-1, micro_batch, 2)
    padded = -(-batches.max(1) // pad_to) * pad_to
    return float(1 - batches.prod(2).sum() / (micro_batch * padded.prod(1).sum()))
