"""The DALI decoder: encoded bytes and the plan go in through an external source, finished uint8 batches come out.

Order, crops and randomness stay ours: the pipeline decodes the planned region (nvJPEG where there is a GPU), resizes
it with antialiasing and flips it. The rest of the plan is done on the batch by ``dali_augment``; normalisation, erasing
and mixing are the mixer's, as for the CPU decoder. Without a GPU the same pipeline runs on the CPU.

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
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dattrain.config.sections import Data
from dattrain.data.augment.device_transforms import Work, carry_out, prepare
from dattrain.data.augment.plan import crop_box, eval_geometry, source_edges
from dattrain.data.batch import Batch
from dattrain.data.decode import images
from dattrain.data.decode.cpu import EvalTransform, assemble, decode_sample
from dattrain.data.decode.dali_pipeline import (
    Device,
    device_of,
    eval_pipeline,
    fits,
    placeholder,
    release,
    train_pipeline,
)
from dattrain.data.decode.dali_probe import probe, remedy
from dattrain.data.feed import Encoded, bad_sample_message
from dattrain.data.to_device import stage
from dattrain.errors import UserError

log = logging.getLogger(__name__)

_UNEXPLAINED = 3
"""Failures of the pipeline on batches that decode well on the CPU, one after the other, before they are errors."""


@dataclass
class _Prepared:
    """One micro-batch on its way: what is read, what the pipeline gets, and what was decoded without it.

    ``here`` is B bool: the rows that the pipeline decodes, and ``work`` what remains to be done on them; ``done`` holds the
    finished pixels (H x W x 3) of others.
    """

    encoded: Encoded
    here: NDArray[np.bool_]
    inputs: tuple[Any, ...]
    done: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)
    work: Work = field(default_factory=Work)


class DaliDecoder:
    """Iterator of decoded micro-batches.

    Args:
        read: delivers the encoded images of a micro-batch by its number; called from threads.
        batch: images of the largest micro-batch.
        size: (height, width) of the output.
        skip_bad: keep a bad sample's place with zero weight; else it is an error.
        interpolation: ``bicubic`` or ``bilinear``.
        data: threads, queue depth and memory.
        device: where batches are made.
        transform: of evaluation; None in training, where the plan says what is done.
        count: number of batches; None is without end.
        threads: that read; one keeps the calls of ``read`` in order.

    Raises:
        UserError: from the iterator, what ``read`` raises and for a bad image, and where DALI fails on good ones; here
            where DALI is not installed, or its decoder does not work on this GPU (see ``dali_probe``).
    """

    def __init__(
        self,
        read: Callable[[int], Encoded],
        *,
        batch: int,
        size: tuple[int, int],
        skip_bad: bool,
        interpolation: str,
        data: Data,
        device: torch.device,
        transform: EvalTransform | None = None,
        count: int | None = None,
        threads: int = 1,
    ) -> None:
        self._device, self._data = device, data
        self._check()
        self.read = read
        self.size = size
        self.skip_bad = skip_bad
        self.interpolation = interpolation
        self.transform = transform
        self.count = count
        self.rebuilt = 0
        self._batch = batch
        self._threads = threads
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="read")
        self._reading: deque[Future[_Prepared]] = deque()
        self._asked = self._given = 0
        self._again: deque[_Prepared] = deque()
        self._sent: deque[_Prepared] = deque()
        self._avoid: set[str] = set()
        self._unexplained = 0
        self._error: UserError | None = None
        self._ready: deque[tuple[Batch, Any] | Exception] = deque()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._used: deque[tuple[Any, _Prepared | None]] = deque()
        self._pipeline: Any = self._build()

    def __iter__(self) -> DaliDecoder:
        return self

    def __next__(self) -> Batch:
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
            batch.images.record_stream(current)
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
            # The loader's copies of them shall not block; images are on the device.
            batch = replace(batch, labels=batch.labels.pin_memory(), weight=batch.weight.pin_memory())
        except Exception as error:
            self._ready.append(error)
            return
        self._ready.append((batch, made))
        # DALI reads its inputs in place: they are held until the device is past the batch.
        while self._used and self._used[0][0].query():
            self._used.popleft()
        self._used.append((made, prepared))

    def _make(self) -> tuple[Batch, _Prepared | None]:
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

    def _build(self) -> Any:
        make = train_pipeline if self.transform is None else eval_pipeline
        return make(self._source, self._batch, self.size, self.interpolation, self._settings())

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

    def _read(self) -> _Prepared:
        while len(self._reading) < self._threads + self._data.prefetch and self._asked != self.count:
            self._reading.append(self._pool.submit(self._prepare, self._asked))
            self._asked += 1
        if not self._reading:
            raise StopIteration
        return self._reading.popleft().result()

    def _last(self) -> Batch:
        """After the pipeline's end: the error that ended it, or the empty batches that are due."""
        if self._error is not None:
            self.close()
            raise self._error
        if self.count is None or self._given >= self.count:
            self.close()
            raise StopIteration
        encoded = self.read(self._given)
        self._given += 1
        pixels = torch.empty((0, *self.size, 3), dtype=torch.uint8, device=self._device)
        return assemble(pixels.permute(0, 3, 1, 2), encoded, {})

    def _prepare(self, number: int) -> _Prepared:
        """Read a micro-batch, choose what DALI decodes, and decode the rest."""
        encoded = self.read(number)
        n = len(encoded.data)
        prepared = _Prepared(encoded, np.zeros(n, dtype=bool), (), bad=dict(encoded.bad))
        stand_in, stand_in_size = placeholder()
        files: list[NDArray[np.uint8]] = [stand_in] * n
        sizes = [stand_in_size] * n
        for i, content in enumerate(encoded.data):
            if content is None:
                continue
            if fits(content) and encoded.where[i] not in self._avoid and (size := _size(content)):
                files[i], sizes[i] = np.frombuffer(content, dtype=np.uint8), size
                prepared.here[i] = True
            else:
                self._decode_here(prepared, i)
        prepared.inputs = (files, *self._geometry(encoded, sizes, prepared.here))
        if encoded.request.plan is not None:
            prepared.work = prepare(encoded.request.plan, prepared.here)
        return prepared

    def _geometry(
        self, encoded: Encoded, sizes: list[tuple[int, int]], here: NDArray[np.bool_]
    ) -> tuple[NDArray[Any], ...]:
        """The crops of images, in pixels of the file.

        In training (top, left), (height, width) and flip of each; in evaluation its edges, (top, left) and (bottom, right).
        """
        plan = encoded.request.plan
        if plan is None:
            t = self.transform
            assert t is not None
            edges = [
                source_edges(
                    hw, *eval_geometry(*hw, self.size, resize=t.resize, crop_pct=t.crop_pct), self.size
                )
                for hw in sizes
            ]
            both = np.asarray(edges, dtype=np.float32).reshape(-1, 2, 2)
            return np.ascontiguousarray(both[:, 0]), np.ascontiguousarray(both[:, 1])
        boxes = [
            crop_box(plan.crop[i], *hw, plan.crop_ratio) if here[i] else (0, 0, *hw)
            for i, hw in enumerate(sizes)
        ]
        table = np.asarray(boxes, dtype=np.int32).reshape(-1, 4)
        corner, extent = np.ascontiguousarray(table[:, :2]), np.ascontiguousarray(table[:, 2:])
        return corner, extent, plan.flip.astype(np.int32)

    def _decode_here(self, prepared: _Prepared, i: int) -> None:
        """Decode one image with the CPU decoder's functions. Raises UserError for a bad one without ``skip_bad``."""
        out = torch.empty((*self.size, 3), dtype=torch.uint8)
        reason = decode_sample(prepared.encoded, i, self.transform, out)
        if reason is None:
            prepared.done[i] = out.numpy()
        elif self.skip_bad:
            prepared.bad[i] = reason
        else:
            raise UserError(bad_sample_message(reason))

    def _finish(self, prepared: _Prepared, output: Any) -> Batch:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        pixels = torch.empty((len(prepared.here), *self.size, 3), dtype=torch.uint8, device=self._device)
        feed_ndarray(output.as_tensor(), pixels, cuda_stream=self._stream)
        return self._assemble(prepared, pixels)

    def _assemble(self, prepared: _Prepared, pixels: torch.Tensor) -> Batch:
        """The batch of ``pixels`` (B x H x W x 3 uint8), with one copy from the host for all that is done on them."""
        done, bad = sorted(prepared.done), sorted(prepared.bad)
        images = np.empty((len(done), *self.size, 3), dtype=np.uint8)
        for i, row in enumerate(done):
            images[i] = prepared.done[row]
        rows = (np.asarray(done, dtype=np.int64), np.asarray(bad, dtype=np.int64))
        done_at, bad_at, finished, *arguments = stage([*rows, images, *prepared.work.arrays], self._device)
        if done:
            pixels[done_at] = finished
        if bad:
            pixels.index_fill_(0, bad_at, 0)
        carry_out(pixels, prepared.work, arguments)
        return assemble(pixels.permute(0, 3, 1, 2), prepared.encoded, prepared.bad)

    def _recover(self, error: RuntimeError) -> Batch:
        """The batch on which the pipeline failed, decoded here; the pipeline anew for those after it."""
        prepared, *rest = self._sent
        self._sent.clear()
        # What the pipeline had asked for already comes again, in order.
        self._again.extendleft(reversed(rest))
        self.rebuilt += 1
        names = [prepared.encoded.where[i] for i in np.flatnonzero(prepared.here)]
        try:
            for i in np.flatnonzero(prepared.here).tolist():
                self._decode_here(prepared, i)
        except UserError:
            self.close()
            raise
        bad = [prepared.encoded.where[i] for i in prepared.bad]
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
        pixels = torch.zeros((len(prepared.here), *self.size, 3), dtype=torch.uint8, device=self._device)
        return self._assemble(prepared, pixels)


def _size(data: bytes) -> tuple[int, int] | None:
    """Height and width; None for what must not be decoded, of which the CPU decoder says why."""
    try:
        return images.size(data)
    except images.BadImage:
        return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
