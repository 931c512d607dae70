"""The DALI decoder of images with a label: the planned region is decoded, resized with antialiasing and flipped by DALI.

The rest of the plan is done on the batch by ``augment.device_transforms``; normalisation, erasing and mixing are the mixer's, as for the
CPU decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dattrain.config.data_sections import Data
from dattrain.data.augment.device_transforms import carry_out, prepare
from dattrain.data.augment.plan import eval_geometry, source_edges
from dattrain.data.batch import Batch
from dattrain.data.decode.cpu import EvalTransform, assemble, decode_sample
from dattrain.data.decode.dali_base import PipelineDecoder, Prepared
from dattrain.data.decode.dali_pipeline import eval_pipeline, placeholder, train_pipeline
from dattrain.data.feed import Encoded
from dattrain.data.to_device import stage


class DaliDecoder(PipelineDecoder[Encoded, Batch]):
    """Images with a label each.

    Arguments beyond those of ``PipelineDecoder``:

    Args:
        batch: images of the largest micro-batch.
        size: (height, width) of the output.
        interpolation: ``bicubic`` or ``bilinear``.
        transform: of evaluation; None in training, where the plan says what is done.
    """

    def __init__(
        self,
        read: Callable[[int], Encoded],
        *,
        batch: int,
        size: tuple[int, int],
        interpolation: str,
        skip_bad: bool,
        data: Data,
        device: torch.device,
        transform: EvalTransform | None = None,
        count: int | None = None,
        threads: int = 1,
    ) -> None:
        self.batch, self.size = batch, size
        self.interpolation = interpolation
        self.transform = transform
        super().__init__(read, skip_bad=skip_bad, data=data, device=device, count=count, threads=threads)

    def _build(self) -> Any:
        make = train_pipeline if self.transform is None else eval_pipeline
        return make(self._source, self.batch, self.size, self.interpolation, self._settings())

    def _prepare(self, number: int) -> Prepared[Encoded]:
        encoded = self.read(number)
        n = len(encoded.data)
        prepared = Prepared(encoded, encoded.where, np.zeros(n, dtype=bool), dict(encoded.bad))
        stand_in, stand_in_size = placeholder()
        files: list[NDArray[np.uint8]] = [stand_in] * n
        sizes = [stand_in_size] * n
        for i, content in enumerate(encoded.data):
            if content is None:
                continue
            size = self._size(prepared, i, content)
            if size is None:
                self._decode_rest(prepared, [i])
            else:
                files[i], sizes[i] = np.frombuffer(content, dtype=np.uint8), size
                prepared.here[i] = True
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
        boxes = [plan.region(i, *hw)[:4] if here[i] else (0, 0, *hw) for i, hw in enumerate(sizes)]
        table = np.asarray(boxes, dtype=np.int32).reshape(-1, 4)
        corner, extent = np.ascontiguousarray(table[:, :2]), np.ascontiguousarray(table[:, 2:])
        return corner, extent, plan.flip.astype(np.int32)

    def _decode_here(self, prepared: Prepared[Encoded], i: int) -> str | None:
        out = torch.empty((*self.size, 3), dtype=torch.uint8)
        reason = decode_sample(prepared.encoded, i, self.transform, out)
        if reason is None:
            prepared.done[i] = out.numpy()
        return reason

    def _finish(self, prepared: Prepared[Encoded], output: Any) -> Batch:
        return self._assemble(prepared, self._fed(output, (len(prepared.here), *self.size, 3)))

    def _assemble(self, prepared: Prepared[Encoded], pixels: torch.Tensor) -> Batch:
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
        batch = assemble(pixels.permute(0, 3, 1, 2), prepared.encoded, prepared.bad)
        return replace(batch, labels=self._pinned(batch.labels), weight=self._pinned(batch.weight))

    def _made_there(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        return (batch.images,)
