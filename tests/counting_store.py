"""gloo groups of many ranks in one process, a thread for each, and what they ask of the store that all of them share."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import HashStore, ProcessGroupGloo, Store

LIMIT = timedelta(seconds=120)


class CountingStore(Store):
    """A rank's view of a store: counts requests by kind, and bytes of values. It has what gloo calls."""

    def __init__(self, inner: Store, counts: Counter[str], lock: threading.Lock) -> None:
        super().__init__()
        self._inner, self._counts, self._lock = inner, counts, lock

    def _count(self, kind: str, nbytes: int) -> None:
        with self._lock:
            self._counts[kind] += 1
            self._counts[f"{kind} bytes"] += nbytes

    def set(self, key: str, value: Any) -> None:
        self._count("set", len(value))
        self._inner.set(key, value)

    def get(self, key: str) -> bytes:
        value = self._inner.get(key)
        self._count("get", len(value))
        return value

    def wait(self, keys: list[str], timeout: timedelta = LIMIT) -> None:
        self._count("wait", 0)
        self._inner.wait(keys, timeout)


class GlooGroup:
    """``world`` ranks of one group, as ``torch.distributed`` makes it in each rank's process."""

    def __init__(self, world: int) -> None:
        self.world, self.counts = world, Counter[str]()
        before = _descriptors()
        inner, lock = HashStore(), threading.Lock()
        # Kept: a group that connects later calls them.
        self._stores = [CountingStore(inner, self.counts, lock) for _ in range(world)]
        self._groups: list[Any] = [None] * world

        def make(rank: int) -> None:
            self._groups[rank] = ProcessGroupGloo(self._stores[rank], rank, world, timeout=LIMIT)

        self._on_all(make)
        self.descriptors = _descriptors() - before
        """Of all ranks together."""

    def use(self) -> None:
        """One of each exchange that a training has on gloo: the object collectives are made of these."""
        before, groups, last = _descriptors(), self._groups, self.world - 1
        several = [torch.zeros(8) for _ in range(self.world)]

        def exchange(rank: int) -> None:
            group = groups[rank]
            value = torch.full((8,), float(rank))
            group.allreduce([value]).wait()
            assert float(value[0]) == last * (last + 1) / 2
            group.broadcast(value, 0).wait()
            group.barrier().wait()
            group.allgather([[torch.zeros(8) for _ in several]], [torch.full((8,), float(rank))]).wait()
            group.gather(several if rank == 0 else [], torch.full((8,), float(rank)), 0).wait()

        self._on_all(exchange)
        assert [float(each[0]) for each in several] == list(range(self.world))
        self.descriptors += _descriptors() - before

    def _on_all(self, action: Callable[[int], None]) -> None:
        failures: list[BaseException] = []

        def run(rank: int) -> None:
            try:
                action(rank)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
