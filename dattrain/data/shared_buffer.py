"""Shared memory that worker processes write batches into again and again.

A new shared segment for each batch would cost a page fault for every 4 KiB in the worker, and as much again to give
the pages back: about a tenth of what decoding costs. So the pages are mapped once, before the workers are forked, and
a slot returns to its worker when the last tensor on it is gone, whoever holds it for however long. A worker that
finds no slot free takes memory of its own, as torch would.
"""

from __future__ import annotations

import itertools
import mmap
import weakref

import numpy as np
import torch
from numpy.typing import NDArray

_numbers = itertools.count()
# By number, since what arrives from a worker can name a buffer but not hold it.
_buffers: weakref.WeakValueDictionary[int, SharedBatchBuffer] = weakref.WeakValueDictionary()


class SharedBatchBuffer:
    """Slots of ``nbytes`` for each of ``workers`` processes, which must be forked after this is made.

    Only a worker marks its slot as taken, and only the parent marks it as free.
    """

    def __init__(self, workers: int, slots: int, nbytes: int) -> None:
        self.workers = workers
        self.slots = slots
        self.nbytes = nbytes
        self.number = next(_numbers)
        self._memory = mmap.mmap(-1, max(1, workers * slots * nbytes))
        self._taken = mmap.mmap(-1, max(1, workers * slots))
        _buffers[self.number] = self

    def take(self, worker: int) -> int | None:
        """A free slot of a worker; None where the parent still holds all of them. In the worker."""
        first = worker * self.slots
        for slot in range(first, first + self.slots):
            if not self._taken[slot]:
                self._taken[slot] = 1
                return slot
        return None

    def write(self, slot: int, count: int) -> torch.Tensor:
        """``count`` bytes of a slot, uint8. In the worker."""
        return torch.from_numpy(self._bytes(slot, count))

    def read(self, slot: int, count: int) -> torch.Tensor:
        """What was written; the slot is free again when this tensor and all views of it are gone. In the parent."""
        content = self._bytes(slot, count)
        # torch keeps the array as long as the storage lives, so this fires after the last view.
        weakref.finalize(content, self._taken.__setitem__, slot, 0).atexit = False
        return torch.from_numpy(content)

    def _bytes(self, slot: int, count: int) -> NDArray[np.uint8]:
        return np.frombuffer(self._memory, dtype=np.uint8, count=count, offset=slot * self.nbytes)


def buffer(number: int) -> SharedBatchBuffer:
    """The buffer of that number, which is alive as long as its decoder."""
    return _buffers[number]


def room(among: SharedBatchBuffer | None, count: int) -> tuple[torch.Tensor, tuple[int, int] | None]:
    """``count`` uninitialised bytes (uint8) for a batch that is being made, and which slot of which buffer they are.

    In a worker they are in shared memory, and go to the trainer without a copy: in a slot of ``among`` where one is free and
    large enough, else in memory of their own (slot None).
    """
    worker = torch.utils.data.get_worker_info()
    fits = among is not None and 0 < count <= among.nbytes
    slot = among.take(worker.id if worker else 0) if among is not None and fits else None
    if among is not None and slot is not None:
        if worker is None:
            return among.read(slot, count), None
        return among.write(slot, count), (among.number, slot)
    if worker is None or not count:
        return torch.empty(count, dtype=torch.uint8), None
    storage = torch.UntypedStorage._new_shared(count, device="cpu")
    own: torch.Tensor = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (count,))  # type: ignore[call-overload]
    return own, None
