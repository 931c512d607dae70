"""The DALI decoder of images with maps, for training: DALI decodes an image, resizes the part that the crop takes, and flips it.

Maps stay on the CPU until they are cropped: the crop's place depends on them (``dense_transforms.choose_crop``), and reading it back
from a device would stop the training stream. The distortion is the CPU decoder's own function, on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dattrain.config.data_sections import Data
from dattrain.data.annotations.semantic import VOID, semantic_map
from dattrain.data.augment.dense_transforms import choose_crop, distort, train_sample
from dattrain.data.augment.plan import source_edges
from dattrain.data.decode.dali_base import PipelineDecoder, Prepared
from dattrain.data.decode.dali_pipeline import dense_pipeline, placeholder
from dattrain.data.decode.dense import EncodedMaps, assemble, batch_size, decode_sample, nothing
from dattrain.data.dense_batch import SegmentationBatch
from dattrain.data.source.sample import BadSample
from dattrain.data.to_device import stage


@dataclass
class _Prepared(Prepared[EncodedMaps]):
    """``maps`` are finished but for the padding, as are the 3 x H x W images of ``done``."""

    maps: list[NDArray[np.uint8]] = field(default_factory=list)


class DaliSegmentationDecoder(PipelineDecoder[EncodedMaps, SegmentationBatch]):
    """Training's images with their maps.

    Arguments beyond those of ``PipelineDecoder``:

    Args:
        batch: images of a micro-batch.
        pad_to: see ``SegmentationDecoder``.
        interpolation: of images, ``bicubic`` or ``bilinear``.
    """

    def __init__(
        self,
        read: Callable[[int], EncodedMaps],
        *,
        batch: int,
        pad_to: int,
        interpolation: str,
        skip_bad: bool,
        data: Data,
        device: torch.device,
        threads: int = 1,
    ) -> None:
        self.batch, self.pad_to, self.interpolation = batch, pad_to, interpolation
        super().__init__(read, skip_bad=skip_bad, data=data, device=device, threads=threads)

    def _build(self) -> Any:
        return dense_pipeline(self._source, self.batch, self.interpolation, self._settings())

    def _prepare(self, number: int) -> _Prepared:
        encoded = self.read(number)
        found, plan = encoded.found, encoded.plan
        assert plan is not None
        n = len(found.samples)
        prepared = _Prepared(encoded, found.where, np.zeros(n, dtype=bool), dict(found.bad))
        prepared.maps = [nothing(plan)[1].numpy()] * n
        stand_in, stand_in_size = placeholder()
        files: list[NDArray[np.uint8]] = [stand_in] * n
        start, end, size = (
            np.tile(np.asarray(pair, np.float32), (n, 1)) for pair in ((0, 0), stand_in_size, (1, 1))
        )
        for i, sample in enumerate(found.samples):
            if sample is None:
                continue
            stored = self._size(prepared, i, sample.data)
            if stored is None:
                self._decode_rest(prepared, [i])
                continue
            try:
                classes = semantic_map(sample.annotation, stored, encoded.numbers, sample.where)
            except BadSample:
                # The CPU decoder says which of the two is at fault.
                self._decode_rest(prepared, [i])
                continue
            resized = plan.resized(i, *stored)
            (rows, columns), crop = choose_crop(torch.from_numpy(classes), resized, plan, i)
            height, width = crop.shape
            files[i], size[i] = np.frombuffer(sample.data, dtype=np.uint8), (height, width)
            start[i], end[i] = source_edges(stored, resized, (rows.start, columns.start), (height, width))
            prepared.maps[i] = (crop.flip(1) if plan.flip[i] else crop).numpy()
            prepared.here[i] = True
        prepared.inputs = (files, start, end, size, plan.flip.astype(np.int32))
        return prepared

    def _decode_here(self, prepared: Prepared[EncodedMaps], i: int) -> str | None:
        assert isinstance(prepared, _Prepared)
        encoded = prepared.encoded
        sample, plan = encoded.found.samples[i], encoded.plan
        assert sample is not None and plan is not None
        try:
            image, classes = train_sample(*decode_sample(sample, encoded.numbers), plan, i)
        except BadSample as error:
            prepared.maps[i] = nothing(plan)[1].numpy()
            return str(error)
        prepared.done[i], prepared.maps[i] = image.numpy(), classes.numpy()
        return None

    def _finish(self, prepared: Prepared[EncodedMaps], output: Any) -> SegmentationBatch:
        assert isinstance(prepared, _Prepared)
        plan = prepared.encoded.plan
        assert plan is not None
        sizes = [classes.shape for classes in prepared.maps]
        shape = (len(sizes), *batch_size(sizes, plan, self.pad_to))
        maps = np.full(shape, VOID, dtype=np.uint8)
        for padded, classes, (height, width) in zip(maps, prepared.maps, sizes):
            padded[:height, :width] = classes
        done = sorted(prepared.done)
        # One copy from the host for all that it made.
        on_device, *finished = stage([maps, *(prepared.done[i] for i in done)], self._device)
        pixels = torch.zeros((shape[0], 3, *shape[1:]), dtype=torch.uint8, device=self._device)
        ready = dict(zip(done, finished))
        if output is not None:
            most = prepared.inputs[3].max(0).astype(int).tolist()
            decoded = self._fed(output, (shape[0], *most, 3)).permute(0, 3, 1, 2)
            for i in np.flatnonzero(prepared.here).tolist():
                height, width = sizes[i]
                ready[i] = distort(decoded[i, :, :height, :width], plan, i)
        for i, image in ready.items():
            pixels[i, :, : image.shape[1], : image.shape[2]] = image
        batch = assemble(pixels, on_device, torch.tensor(sizes).view(-1, 2), prepared.encoded, prepared.bad)
        return replace(batch, weight=self._pinned(batch.weight))

    def _made_there(self, batch: SegmentationBatch) -> tuple[torch.Tensor, ...]:
        return batch.images, batch.maps
