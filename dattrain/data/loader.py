"""The loaders of one rank: micro-batches from a decoder to the device. What they are made of is put together in ``factory``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch

from dattrain.data import identity
from dattrain.data.classes import Classes
from dattrain.data.feed import EvalFeed
from dattrain.data.source.dataset import Dataset

log = logging.getLogger(__name__)

_NAMES_KEPT = 1000
_SHOWN = 10
_SHARDS_PER_PREFETCH = 8


class HostBatch(Protocol):
    """What a loader must know of a batch; what else it holds is between a decoder and a task."""

    @property
    def bad(self) -> tuple[tuple[str, str], ...]:
        """(key, reason) of the samples that were skipped."""

    @property
    def device_tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that ``to`` moves."""

    def to(self, device: torch.device) -> Any:
        """The batch with these tensors on ``device``."""


B = TypeVar("B", bound=HostBatch)
B_co = TypeVar("B_co", bound=HostBatch, covariant=True)


class Decoder(Protocol[B_co]):
    """An iterator of decoded batches. Raises UserError from ``__next__``."""

    def __iter__(self) -> Iterator[B_co]: ...

    def __next__(self) -> B_co: ...

    def close(self) -> None:
        """End processes and threads."""
        ...


@dataclass
class SkippedSamples:
    """Skipped samples of this rank: how many times one was skipped, and key to reason of the first thousand, each named once in the log."""

    count: int = 0
    samples: dict[str, str] = field(default_factory=dict)

    def add(self, samples: Iterable[tuple[str, str]]) -> None:
        """Count more, each of which is (key, reason)."""
        for key, reason in samples:
            self.count += 1
            if key not in self.samples and len(self.samples) < _NAMES_KEPT:
                self.samples[key] = reason
                # A screen has room for some; the log of the rank has all.
                level = logging.WARNING if len(self.samples) <= _SHOWN else logging.INFO
                log.log(level, "skipped: %s", reason)


class TrainLoader(Generic[B]):
    """Micro-batches of one rank, for ever. See docs/design/contracts.md.

    Args:
        decoder: the batches, on the host.
        device: where they go.
        before: called with the number of micro-batches served, before each.
        close: releases what ``decoder`` reads from.

    Attributes:
        classes: what the network's outputs stand for, as this training set or ``data.labels`` decides.
        samples_per_epoch: samples of the set.
        identity: of the set (``dattrain.data.identity``).
        skipped: samples that were bad, under ``data.on_bad: skip``.
    """

    def __init__(
        self,
        decoder: Decoder[B],
        classes: Classes,
        *,
        samples_per_epoch: int,
        identity: Sequence[identity.Part],
        device: torch.device,
        before: Callable[[int], None] = lambda served: None,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.classes = classes
        self.samples_per_epoch = samples_per_epoch
        self.identity = identity
        self.skipped = SkippedSamples()
        self._decoder = decoder
        self._before = before
        self._close = close
        self._to_device = DevicePrefetcher(device)
        self._waited = 0.0
        self._served = 0

    def __iter__(self) -> Iterator[B]:
        return self

    def __next__(self) -> B:
        self._before(self._served)
        start = time.perf_counter()
        batch = next(self._decoder)
        self._waited += time.perf_counter() - start
        self._served += 1
        self.skipped.add(batch.bad)
        return self._to_device(batch)

    @property
    def wait_s(self) -> float:
        """Seconds spent waiting for data since this was last read."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """End the workers and release files."""
        self._decoder.close()
        self._close()


class EvalLoader(Generic[B]):
    """Batches of one rank over the whole evaluation set, each image once over all ranks, in a fixed order.

    Every rank yields ``len(loader)`` batches; the last ones may be shorter or empty. It can be iterated repeatedly.

    Args:
        decoder: opens the decoder of the set's ``len(feed)`` batches, once per iteration.
        device: where batches go.

    Attributes:
        samples: of the whole set.
        skipped: samples that were bad, under ``data.on_bad: skip``.
    """

    def __init__(
        self, dataset: Dataset, feed: EvalFeed, decoder: Callable[[], Decoder[B]], device: torch.device
    ) -> None:
        self.dataset = dataset
        self.samples = int(dataset.counts.sum())
        self.skipped = SkippedSamples()
        self._feed = feed
        self._open = decoder
        self._to_device = DevicePrefetcher(device)
        self._prefetched = -1

    def __len__(self) -> int:
        return len(self._feed)

    def __iter__(self) -> Iterator[B]:
        decoder = self._open()
        try:
            for number in range(len(self)):
                self._prefetch(number)
                batch = next(decoder)
                self.skipped.add(batch.bad)
                yield self._to_device(batch)
        finally:
            decoder.close()

    def _prefetch(self, number: int) -> None:
        if not self.dataset.prefetches:
            return
        first = self._feed.request(number).shards[:1].tolist()
        if first and first[0] != self._prefetched:
            self._prefetched = first[0]
            self.dataset.prefetch(
                range(first[0], min(first[0] + _SHARDS_PER_PREFETCH, len(self.dataset.counts)))
            )

    def close(self) -> None:
        """Release files."""
        self.dataset.close()


class DevicePrefetcher:
    """Moves batches to the device; on CUDA by a stream of its own, so that copies run beside the computation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: B) -> B:
        """The batch on the device; on CUDA its copies may still be on their way, which the current stream waits for."""
        moved: B
        if self._stream is None:
            moved = batch.to(self.device)
            return moved
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            moved = batch.to(self.device)
        current.wait_stream(self._stream)
        for tensor in moved.device_tensors:
            # The allocator must not hand the memory out again before the consumer's stream is done with it.
            tensor.record_stream(current)
        return moved
