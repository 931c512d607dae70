"""Images with their maps on the CPU: from the number of a micro-batch to the finished ``SegmentationBatch``, run by worker processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from dattrain.data.annotations.semantic import VOID, semantic_map
from dattrain.data.augment.dense_plan import DensePlan
from dattrain.data.augment.dense_transforms import train_sample
from dattrain.data.decode import images
from dattrain.data.dense_batch import SegmentationBatch, empty
from dattrain.data.feed import BatchRequest, Found, bad_sample_message, read_samples
from dattrain.data.shared_buffer import SharedBatchBuffer
from dattrain.data.source.sample import BadSample, Dataset, Sample
from dattrain.data.worker_progress import note
from dattrain.errors import UserError

_NOTHING = 32
"""Pixels of a side of what stands in a bad sample's place, where the crop is not smaller."""
T = TypeVar("T")
_Pixels = tuple[torch.Tensor, torch.Tensor]
"""An image (3 x H x W uint8) and its map (H x W uint8)."""


@dataclass(frozen=True)
class EncodedMaps:
    """Encoded images and maps of one micro-batch.

    Attributes:
        request: which samples.
        found: their bytes.
        plan: what is done to them in training; None in evaluation, where both stay as they are.
        numbers: the class number of each of the set's own classes; None where they are the network's.
    """

    request: BatchRequest
    found: Found
    plan: DensePlan | None
    numbers: NDArray[np.int64] | None


def fetch(dataset: Dataset, request: BatchRequest, plan: DensePlan | None, *, skip_bad: bool) -> EncodedMaps:
    """Read the images and maps of a request.

    Raises:
        UserError: a bad sample without ``skip_bad``; always for a damaged shard.
    """
    return EncodedMaps(request, read_samples(dataset, request, skip_bad=skip_bad), plan, dataset.numbers)


@dataclass(frozen=True)
class SegmentationDecoder:
    """Map from the number of a micro-batch to the decoded batch.

    Args:
        read: delivers the encoded images and maps of a micro-batch.
        pad_to: whole images are padded to the largest of their micro-batch, rounded up to a multiple of this.
        skip_bad: keep a bad sample's place with zero weight; else it is an error.
        buffer: where worker processes put their batches; None gives each batch memory of its own.
    """

    read: Callable[[int], EncodedMaps]
    _: KW_ONLY
    pad_to: int
    skip_bad: bool
    buffer: SharedBatchBuffer | None = None

    def __call__(self, number: int) -> SegmentationBatch:
        """Read and decode micro-batch ``number``. Raises UserError as ``read`` does, and as ``decode``."""
        return self.decode(self.read(number))

    def decode(self, encoded: EncodedMaps) -> SegmentationBatch:
        """Decode what was read. Raises UserError for a bad image or map without ``skip_bad``."""
        plan = encoded.plan

        def finished(i: int, sample: Sample) -> _Pixels:
            pixels = decode_sample(sample, encoded.numbers)
            return pixels if plan is None else train_sample(*pixels, plan, i)

        done, bad = decode_each(encoded.found, finished, skip_bad=self.skip_bad)
        return self._batch([nothing(plan) if one is None else one for one in done], encoded, bad)

    def _batch(self, done: list[_Pixels], encoded: EncodedMaps, bad: dict[int, str]) -> SegmentationBatch:
        sizes = torch.tensor([classes.shape for _, classes in done], dtype=torch.int64).view(-1, 2)
        size = batch_size(sizes.tolist(), encoded.plan, self.pad_to)
        pixels, maps, slot = empty((len(done), *size), self.buffer)
        for i, (image, classes) in enumerate(done):
            put(pixels[i], image, 0)
            put(maps[i], classes, VOID)
        batch = assemble(pixels, maps, sizes, encoded, bad)
        return batch if slot is None else replace(batch, slot=slot)


def decode_each(
    found: Found, decode: Callable[[int, Sample], T], *, skip_bad: bool
) -> tuple[list[T | None], dict[int, str]]:
    """What ``decode`` makes of each sample that was read, with its place; None for a bad one, and the reasons by place.

    Raises:
        UserError: ``decode`` raises BadSample, without ``skip_bad``.
    """
    bad = dict(found.bad)
    done: list[T | None] = [None] * len(found.samples)
    for i, sample in enumerate(found.samples):
        if sample is None:
            continue
        note(found.where[i])
        try:
            done[i] = decode(i, sample)
        except BadSample as error:
            if not skip_bad:
                raise UserError(bad_sample_message(str(error))) from error
            bad[i] = str(error)
    return done, bad


def put(room: torch.Tensor, pixels: torch.Tensor, padding: int) -> None:
    """``pixels`` (... x h x w) into the upper left corner of ``room`` (... x H x W), and ``padding`` into the rest."""
    height, width = pixels.shape[-2:]
    room[..., :height, :width] = pixels
    room[..., height:, :].fill_(padding)
    room[..., :height, width:].fill_(padding)


def batch_size(sizes: Sequence[Sequence[int]], plan: DensePlan | None, pad_to: int) -> tuple[int, int]:
    """Height and width of a batch of images of ``sizes``: the crop, or the largest sides, in training rounded up to ``pad_to``."""
    if plan is not None and plan.crop is not None:
        return plan.crop
    if not sizes:
        return _NOTHING, _NOTHING
    height, width = (max(sides) for sides in zip(*sizes))
    if plan is None:
        return height, width
    return -(-height // pad_to) * pad_to, -(-width // pad_to) * pad_to


def assemble(
    images: torch.Tensor, maps: torch.Tensor, sizes: torch.Tensor, encoded: EncodedMaps, bad: dict[int, str]
) -> SegmentationBatch:
    """The batch of padded images (B x 3 x H x W) and maps (B x H x W); bad samples get weight 0."""
    weight = torch.ones(len(sizes))
    weight[list(bad)] = 0.0
    keys = encoded.found.keys
    return SegmentationBatch(
        images=images,
        maps=maps,
        sizes=sizes,
        weight=weight,
        position=torch.from_numpy(encoded.request.positions),
        keys=keys,
        bad=tuple((keys[i], bad[i]) for i in sorted(bad)),
    )


def decode_sample(sample: Sample, numbers: NDArray[np.int64] | None) -> _Pixels:
    """The image and the map of class numbers of a sample, as large as each other.

    Raises:
        BadSample: either cannot be used, or they do not fit each other.
    """
    try:
        image = images.decode(sample.data)
    except images.BadImage as error:
        raise BadSample(f"{sample.where}: {error}") from error
    height, width = image.shape[1:]
    classes = semantic_map(sample.annotation, (height, width), numbers, sample.where)
    return image, torch.from_numpy(classes)


def labelled(sample: Sample, numbers: NDArray[np.int64] | None) -> bool:
    """Whether a pixel of a sample has a class; its image is not decoded. Raises BadSample as ``decode_sample``."""
    try:
        size = images.size(sample.data)
    except images.BadImage as error:
        raise BadSample(f"{sample.where}: {error}") from error
    return bool((semantic_map(sample.annotation, size, numbers, sample.where) != VOID).any())


def nothing(plan: DensePlan | None) -> _Pixels:
    """What stands in a bad sample's place: black, and nothing labelled."""
    image = black(plan)
    return image, torch.full_like(image[0], VOID)


def black(plan: DensePlan | None) -> torch.Tensor:
    """The image in a bad sample's place: small, and no larger than the crop."""
    height, width = (
        min(_NOTHING, side) for side in (plan.crop if plan and plan.crop else (_NOTHING, _NOTHING))
    )
    return torch.zeros((3, height, width), dtype=torch.uint8)
