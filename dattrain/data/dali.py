"""The DALI decoder: encoded bytes and the plan go in through an external source, finished uint8 batches come out.

Order, crops and randomness stay ours: the pipeline decodes the planned region (nvJPEG where there is a GPU), resizes
it with antialiasing and flips it. The rest of the plan is done on the batch by ``dali_augment``; normalisation, erasing
and mixing are the mixer's, as for the CPU decoder. Without a GPU the same pipeline runs on the CPU.

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
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dattrain.config.schema import Data
from dattrain.data import images
from dattrain.data.augment import crop_box, eval_geometry
from dattrain.data.batch import Batch
from dattrain.data.cpu import EvalTransform, assemble, decode_sample
from dattrain.data.dali_augment import augment
from dattrain.data.dali_pipeline import Device, eval_pipeline, fits, placeholder, release, train_pipeline
from dattrain.data.feed import Encoded, bad_sample_message
from dattrain.errors import UserError

log = logging.getLogger(__name__)

_UNEXPLAINED = 3
"""Failures of the pipeline on batches that decode well on the CPU, one after the other, before they are errors."""


@dataclass
class _Prepared:
    """One micro-batch on its way: what is read, what the pipeline gets, and what was decoded without it.

    ``here`` is B bool: the rows that the pipeline decodes; ``done`` holds the finished pixels (H x W x 3) of others.
    """

    encoded: Encoded
    here: NDArray[np.bool_]
    inputs: tuple[Any, ...]
    done: dict[int, torch.Tensor] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)


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
        UserError: from the iterator, what ``read`` raises and for a bad image; here where DALI is not installed.
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
        self.read = read
        self.size = size
        self.skip_bad = skip_bad
        self.interpolation = interpolation
        self.transform = transform
        self.count = count
        self.rebuilt = 0
        self._data = data
        self._device = device
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
        self._pipeline: Any = self._build()

    def __iter__(self) -> DaliDecoder:
        return self

    def __next__(self) -> Batch:
        if self._pipeline is None:
            raise StopIteration
        try:
            (output,) = self._pipeline.run()
        except StopIteration:
            return self._last()
        except RuntimeError as error:
            batch = self._recover(error)
        else:
            self._unexplained = 0
            batch = self._finish(self._sent.popleft(), output)
        self._given += 1
        return batch

    def close(self) -> None:
        """End the threads and let go of the pipeline's memory."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._pipeline is not None:
            self._pipeline = None
            release(self._device)

    def _build(self) -> Any:
        settings = Device(
            id=None
            if self._device.type != "cuda"
            else self._device.index
            if self._device.index is not None
            else torch.cuda.current_device(),
            threads=self._data.dali_threads,
            depth=self._data.prefetch,
            hw_decoder_load=self._data.dali_hw_decoder_load,
            preallocate=self._data.dali_preallocate_mb * 10**6,
        )
        make = train_pipeline if self.transform is None else eval_pipeline
        return make(self._source, self._batch, self.size, self.interpolation, settings)

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
        return prepared

    def _geometry(
        self, encoded: Encoded, sizes: list[tuple[int, int]], here: NDArray[np.bool_]
    ) -> tuple[NDArray[Any], ...]:
        """Per image: crop (top, left), (height, width) and flip; or in evaluation the size to resize to and the crop's
        (top, left)."""
        plan = encoded.request.plan
        if plan is None:
            t = self.transform
            assert t is not None
            found = [eval_geometry(*hw, self.size, resize=t.resize, crop_pct=t.crop_pct) for hw in sizes]
            return (
                np.asarray([size for size, _ in found], dtype=np.float32).reshape(-1, 2),
                np.asarray([corner for _, corner in found], dtype=np.int32).reshape(-1, 2),
            )
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
            prepared.done[i] = out
        elif self.skip_bad:
            prepared.bad[i] = reason
        else:
            raise UserError(bad_sample_message(reason))

    def _finish(self, prepared: _Prepared, output: Any) -> Batch:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        pixels = torch.empty((len(prepared.here), *self.size, 3), dtype=torch.uint8, device=self._device)
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        feed_ndarray(output.as_tensor(), pixels, cuda_stream=stream)
        return self._assemble(prepared, pixels)

    def _assemble(self, prepared: _Prepared, pixels: torch.Tensor) -> Batch:
        for i, done in prepared.done.items():
            pixels[i].copy_(done)
        for i in prepared.bad:
            pixels[i].zero_()
        plan = prepared.encoded.request.plan
        if plan is not None:
            augment(pixels, plan, prepared.here)
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
            raise error
        culprits = culprits or names
        self._avoid.update(culprits)
        log.warning(
            "DALI failed on a batch (%s); it was decoded on the CPU, and so will be %s from now on",
            " ".join(str(error).split())[:300],
            ", ".join(culprits[:3]) + (f" and {len(culprits) - 3} more" if len(culprits) > 3 else ""),
        )
        prepared.here[:] = False
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
