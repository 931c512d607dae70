"""What the DALI decoders share: encoded bytes and the plan go in through an external source, finished uint8 batches come out.

Order, crops and randomness stay ours; the pipeline decodes (by nvJPEG where there is a GPU) and does the geometry. Without a GPU the
same pipeline runs on the CPU.

Batches are made one ahead of those served. On CUDA they are made on a stream of their own, beside the training step, and
the consumer's stream waits for a batch by an event; the host waits for DALI's CPU part alone.

A DALI pipeline cannot skip: one image that does not decode is an error of the whole batch, and the end of the
pipeline. So only what nvJPEG and libjpeg surely know (8-bit baseline or progressive JPEG of one or three components
that ends as it should, and plain PNG) is given to it; the few others are decoded by Pillow beforehand. Where it fails
nevertheless, the batch goes through the CPU decoder's functions, which find the bad sample and say what it has, and
the pipeline is built anew for the batches after it.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from dattrain.config.data_sections import Data
from dattrain.data.augment.device_transforms import Work
from dattrain.data.decode import images
from dattrain.data.decode.dali_pipeline import (
    Device,
    device_of,
    fits,
    release,
)
from dattrain.data.decode.dali_probe import probe, remedy
from dattrain.data.feed import bad_sample_message
from dattrain.data.loader import HostBatch
from dattrain.errors import UserError

log = logging.getLogger(__name__)

_UNEXPLAINED = 3
"""Failures of the pipeline on batches that decode well on the CPU, one after the other, before they are errors."""


E = TypeVar("E")
B = TypeVar("B", bound=HostBatch)


@dataclass
class Prepared(Generic[E]):
    """One micro-batch on its way: what is read, what the pipeline gets, and what was decoded without it.

    ``here`` is B bool: the rows that the pipeline decodes, and ``work`` what remains to be done on them; ``done`` holds the
    finished pixels of others.
    """

    encoded: E
    where: list[str]
    here: NDArray[np.bool_]
    bad: dict[int, str]
    inputs: tuple[Any, ...] = ()
    done: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    work: Work = field(default_factory=Work)


class PipelineDecoder(ABC, Generic[E, B]):
    """Iterator of micro-batches that a DALI pipeline decodes; subclasses say what is done with the images.

    Args:
        read: delivers the encoded images of a micro-batch by its number; called from threads.
        skip_bad: keep a bad sample's place with zero weight; else it is an error.
        data: threads, queue depth and memory.
        device: where batches are made.
        count: number of batches; None is without end.
        threads: that read; one keeps the calls of ``read`` in order.

    Raises:
        UserError: from the iterator, what ``read`` raises and for a bad image, and where DALI fails on good ones; here
            where DALI is not installed, or its decoder does not work on this GPU (see ``dali_probe``).
    """

    def __init__(
        self,
        read: Callable[[int], E],
        *,
        skip_bad: bool,
        data: Data,
        device: torch.device,
        count: int | None = None,
        threads: int = 1,
    ) -> None:
        self._device, self._data = device, data
        self._check()
        self.read = read
        self.skip_bad = skip_bad
        self.count = count
        self.rebuilt = 0
        self._threads = threads
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="read")
        self._reading: deque[Future[Prepared[E]]] = deque()
        self._asked = self._given = 0
        self._again: deque[Prepared[E]] = deque()
        self._sent: deque[Prepared[E]] = deque()
        self._avoid: set[str] = set()
        self._unexplained = 0
        self._error: UserError | None = None
        self._ready: deque[tuple[B, Any] | Exception] = deque()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._used: deque[tuple[Any, Prepared[E] | None]] = deque()
        self._pipeline: Any = self._build()

    @abstractmethod
    def _build(self) -> Any:
        """The pipeline, whose source is ``self._source``."""

    @abstractmethod
    def _prepare(self, number: int) -> Prepared[E]:
        """Read a micro-batch, choose what DALI decodes, and decode the rest; called from threads. Raises UserError."""

    @abstractmethod
    def _decode_here(self, prepared: Prepared[E], i: int) -> str | None:
        """Put image ``i``, decoded with the CPU decoder's functions, into ``prepared.done``; returns what is wrong with it."""

    @abstractmethod
    def _finish(self, prepared: Prepared[E], output: Any) -> B:
        """The batch of the pipeline's output, None where DALI decoded no row. What stays on the host is ``_pinned``."""

    @abstractmethod
    def _made_there(self, batch: B) -> tuple[torch.Tensor, ...]:
        """The tensors of a batch that are on the device."""

    def __iter__(self) -> Iterator[B]:
        return self

    def __next__(self) -> B:
        if not self._ready:
            self._make_next()
        ready = self._ready.popleft()
        if isinstance(ready, Exception):
            raise ready
        self._make_next()
        batch, made = ready
        if made is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(made)
            # The allocator must not hand the memory out again before the consumer's stream is done with it.
            for tensor in self._made_there(batch):
                tensor.record_stream(current)
        return batch

    def close(self) -> None:
        """End the threads and let go of the pipeline's memory."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._ready.clear()
        if self._pipeline is not None:
            self._pipeline = None
            release(self._device)

    def _make_next(self) -> None:
        """Make the next batch, or keep what ended the batches until those before it are served."""
        try:
            if self._stream is None:
                self._ready.append((self._make()[0], None))
                return
            with torch.cuda.stream(self._stream):
                batch, prepared = self._make()
                made = torch.cuda.Event()
                made.record(self._stream)
        except Exception as error:
            self._ready.append(error)
            return
        self._ready.append((batch, made))
        # DALI reads its inputs in place: they are held until the device is past the batch.
        while self._used and self._used[0][0].query():
            self._used.popleft()
        self._used.append((made, prepared))

    def _make(self) -> tuple[B, Prepared[E] | None]:
        """The next batch, and what it is made of; on CUDA its work is queued on the current stream, which is ours."""
        if self._pipeline is None:
            raise StopIteration
        prepared = None
        try:
            (output,) = self._pipeline.run(self._stream)
        except StopIteration:
            return self._last(), None
        except RuntimeError as error:
            batch = self._recover(error)
        else:
            self._unexplained = 0
            prepared = self._sent.popleft()
            batch = self._finish(prepared, output)
        self._given += 1
        return batch, prepared

    def _settings(self) -> Device:
        if self._device.type != "cuda":
            return device_of(None, self._data)
        index = self._device.index
        return device_of(torch.cuda.current_device() if index is None else index, self._data)

    def _check(self) -> None:
        """Ask who decodes on the GPU, before this process depends on it. Raises UserError where it does not work."""
        if self._device.type != "cuda":
            return
        decodes = probe(self._settings())
        level = logging.WARNING if "CPU" in decodes or decodes.startswith("unknown") else logging.INFO
        log.log(level, "data.decoder=dali: regions of JPEGs are decoded by: %s", decodes)

    def _source(self) -> tuple[Any, ...]:
        """The next batch's inputs; DALI asks a few batches ahead."""
        if self._again:
            prepared = self._again.popleft()
        else:
            if self._error is not None:
                raise StopIteration
            try:
                prepared = self._read()
            except UserError as error:
                # The batches before it are still in the pipeline, and come first.
                self._error = error
                raise StopIteration from None
        if not len(prepared.here):
            raise StopIteration  # a rank's last batches in evaluation may be empty: see ``_last``
        self._sent.append(prepared)
        return prepared.inputs

    def _read(self) -> Prepared[E]:
        while len(self._reading) < self._threads + self._data.prefetch and self._asked != self.count:
            self._reading.append(self._pool.submit(self._prepare, self._asked))
            self._asked += 1
        if not self._reading:
            raise StopIteration
        return self._reading.popleft().result()

    def _last(self) -> B:
        """After the pipeline's end: the error that ended it, or the empty batches that are due."""
        if self._error is not None:
            self.close()
            raise self._error
        if self.count is None or self._given >= self.count:
            self.close()
            raise StopIteration
        prepared = self._prepare(self._given)
        self._given += 1
        return self._finish(prepared, None)

    def _size(self, prepared: Prepared[E], i: int, content: bytes) -> tuple[int, int] | None:
        """Height and width of an image that DALI is to decode; None for one that it is not given."""
        if prepared.where[i] in self._avoid or not fits(content):
            return None
        try:
            return images.size(content)
        except images.BadImage:
            return None  # The CPU decoder says why.

    def _decode_rest(self, prepared: Prepared[E], rows: Sequence[int]) -> None:
        """Decode images without DALI. Raises UserError for a bad one without ``skip_bad``."""
        for i in rows:
            reason = self._decode_here(prepared, i)
            if reason is not None:
                if not self.skip_bad:
                    raise UserError(bad_sample_message(reason))
                prepared.bad[i] = reason

    def _fed(self, output: Any, shape: tuple[int, ...]) -> torch.Tensor:
        """The pipeline's output (uint8 of ``shape``) as a tensor; zeros where it has none."""
        if output is None:
            return torch.zeros(shape, dtype=torch.uint8, device=self._device)
        from nvidia.dali.plugin.pytorch import feed_ndarray

        pixels = torch.empty(shape, dtype=torch.uint8, device=self._device)
        feed_ndarray(output.as_tensor(), pixels, cuda_stream=self._stream)
        return pixels

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        """So that the loader's copy to a GPU does not block."""
        return tensor if self._stream is None else tensor.pin_memory()

    def _recover(self, error: RuntimeError) -> B:
        """The batch on which the pipeline failed, decoded here; the pipeline anew for those after it."""
        prepared, *rest = self._sent
        self._sent.clear()
        # What the pipeline had asked for already comes again, in order.
        self._again.extendleft(reversed(rest))
        self.rebuilt += 1
        rows = np.flatnonzero(prepared.here).tolist()
        names = [prepared.where[i] for i in rows]
        try:
            self._decode_rest(prepared, rows)
        except UserError:
            self.close()
            raise
        bad = [prepared.where[i] for i in prepared.bad]
        culprits = [name for name in names if name in bad]
        self._unexplained = 0 if culprits else self._unexplained + 1
        if self._unexplained > _UNEXPLAINED:
            # Not the images, then: out of memory, a driver, a bug. Going on like this would train at a crawl.
            self.close()
            raise UserError(
                f"DALI failed on {self._unexplained} batches one after the other, whose images decode well on the CPU; the "
                f"last error was {_line(error)}; {remedy()}"
            ) from error
        culprits = culprits or names
        self._avoid.update(culprits)
        log.warning(
            "DALI failed on a batch (%s); it was decoded on the CPU, and so will be %s from now on",
            _line(error),
            ", ".join(culprits[:3]) + (f" and {len(culprits) - 3} more" if len(culprits) > 3 else ""),
        )
        prepared.here[:] = False
        prepared.work = Work()
        self._pipeline = None
        self._pipeline = self._build()
        return self._finish(prepared, None)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
