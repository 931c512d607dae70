"""Images with their objects on the CPU: from the number of a micro-batch to the finished ``DetectionBatch``, run by worker processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from dattrain.data.annotations import instances
from dattrain.data.annotations.detection import detected
from dattrain.data.augment.detection_plan import NOBODY, DetectionPlan
from dattrain.data.augment.detection_transforms import StoredImage, Targets, joined, no_targets, train_sample
from dattrain.data.decode import images
from dattrain.data.decode.dense import batch_size, black, decode_each, put
from dattrain.data.detection_batch import DetectionBatch, empty
from dattrain.data.feed import BatchRequest, Found, read_samples
from dattrain.data.shared_buffer import SharedBatchBuffer
from dattrain.data.source.sample import BadSample, Dataset, Sample


@dataclass(frozen=True)
class EncodedObjects:
    """Encoded images and objects of one micro-batch.

    Attributes:
        request: which samples; in training those whose objects are pasted into others come last.
        found: their bytes.
        plan: what is done to them in training; None in evaluation, where they stay as they are.
        numbers: the class number of each of the set's own classes; None where they are the network's.
    """

    request: BatchRequest
    found: Found
    plan: DetectionPlan | None
    numbers: NDArray[np.int64] | None


def fetch(
    dataset: Dataset, request: BatchRequest, plan: DetectionPlan | None, *, skip_bad: bool
) -> EncodedObjects:
    """Read the images and objects of a request.

    Raises:
        UserError: a bad sample without ``skip_bad``; always for a damaged shard.
    """
    return EncodedObjects(request, read_samples(dataset, request, skip_bad=skip_bad), plan, dataset.numbers)


@dataclass(frozen=True)
class DetectionDecoder:
    """Map from the number of a micro-batch to the decoded batch.

    Args:
        read: delivers the encoded images and objects of a micro-batch.
        masks: whether the network gives masks: then batches of training have them.
        need_masks: whether an object without a mask makes its sample a bad one.
        pad_to: whole images are padded to the largest of their micro-batch, rounded up to a multiple of this.
        skip_bad: keep a bad sample's place with zero weight; else it is an error.
        buffer: where worker processes put their batches; None gives each batch memory of its own.
    """

    read: Callable[[int], EncodedObjects]
    _: KW_ONLY
    masks: bool
    need_masks: bool
    pad_to: int
    skip_bad: bool
    buffer: SharedBatchBuffer | None = None

    def __call__(self, number: int) -> DetectionBatch:
        """Read and decode micro-batch ``number``. Raises UserError as ``read`` does, and as ``decode``."""
        return self.decode(self.read(number))

    def decode(self, encoded: EncodedObjects) -> DetectionBatch:
        """Decode what was read. Raises UserError for a bad image or annotation without ``skip_bad``."""

        def stored(i: int, sample: Sample) -> StoredImage:
            training = encoded.plan is not None
            return decode_sample(sample, encoded.numbers, masks=self.need_masks, training=training)

        found, bad = decode_each(encoded.found, stored, skip_bad=self.skip_bad)
        if encoded.plan is not None:
            return self._training(encoded, encoded.plan, found, bad)
        batch = self._batch([_image(one) for one in found], [no_targets(False)] * len(found), encoded, bad)
        return replace(
            batch,
            truth=tuple(instances.nothing() if one is None else one.objects for one in found),
            image_ids=tuple(
                batch.keys[i] if sample is None else image_id(sample, batch.keys[i])
                for i, sample in enumerate(encoded.found.samples)
            ),
        )

    def _training(
        self,
        encoded: EncodedObjects,
        plan: DetectionPlan,
        found: Sequence[StoredImage | None],
        bad: dict[int, str],
    ) -> DetectionBatch:
        pixels, targets, emptied = [], [], 0
        for i, one in enumerate(found[: len(plan)]):
            image, own = black(plan.dense), no_targets(self.masks)
            if one is not None:
                row = int(plan.partner[i])
                # Nothing comes from a bad partner, which is counted where it is trained on.
                partner = None if row == NOBODY else found[row]
                image, own = train_sample(one, plan, i, masks=self.masks, partner=partner)
                emptied += not len(own) and len(one.objects) > 0
            pixels.append(image)
            targets.append(own)
        batch = self._batch(pixels, targets, encoded, {i: why for i, why in bad.items() if i < len(plan)})
        return replace(batch, emptied=emptied)

    def _batch(
        self,
        pixels: Sequence[torch.Tensor],
        targets: Sequence[Targets],
        encoded: EncodedObjects,
        bad: dict[int, str],
    ) -> DetectionBatch:
        """The batch of images (3 x H x W each) and their targets; bad samples get weight 0."""
        count, plan = len(pixels), encoded.plan
        sizes = torch.tensor([image.shape[1:] for image in pixels], dtype=torch.int64).view(-1, 2)
        size = batch_size(sizes.tolist(), None if plan is None else plan.dense, self.pad_to)
        flat = joined(targets, self.masks and plan is not None)
        side = flat.masks.shape[1]
        images, grids, slot = empty((count, *size), (len(flat), side, side), self.buffer)
        for room, image in zip(images, pixels):
            put(room, image, 0)
        grids.numpy()[:] = flat.masks
        weight = torch.ones(count)
        weight[list(bad)] = 0.0
        keys = encoded.found.keys[:count]
        return DetectionBatch(
            images=images,
            sizes=sizes,
            boxes=torch.from_numpy(flat.boxes),
            labels=torch.from_numpy(flat.labels),
            masks=grids,
            counts=tuple(map(len, targets)),
            weight=weight,
            position=torch.from_numpy(encoded.request.positions[:count]),
            keys=keys,
            bad=tuple((keys[i], bad[i]) for i in sorted(bad)),
            slot=slot,
        )


def decode_sample(
    sample: Sample, numbers: NDArray[np.int64] | None, *, masks: bool, training: bool
) -> StoredImage:
    """The image and the objects of a sample.

    Args:
        masks: whether each object must have one.
        training: whether they are to be learned from: without crowds, see ``detected``.

    Raises:
        BadSample: either cannot be used, or they do not fit each other.
    """
    try:
        image = images.decode(sample.data)
    except images.BadImage as error:
        raise BadSample(f"{sample.where}: {error}") from error
    height, width = image.shape[1:]
    found = detected(
        sample.annotation, (height, width), numbers, sample.where, masks=masks, training=training
    )
    return StoredImage(image, found)


def has_object(sample: Sample, numbers: NDArray[np.int64] | None, *, training: bool) -> bool:
    """Whether a sample has an object that is learned from, or one that an evaluation has to find; its image is not decoded.

    Raises:
        BadSample: as ``decode_sample``.
    """
    try:
        size = images.size(sample.data)
    except images.BadImage as error:
        raise BadSample(f"{sample.where}: {error}") from error
    found = detected(sample.annotation, size, numbers, sample.where, masks=False, training=training)
    return bool((~found.crowd).any())


def image_id(sample: Sample, key: str) -> int | str:
    """What an annotation calls its image; ``key`` where it does not, or where it does not parse."""
    try:
        content = json.loads(sample.annotation)
    except (ValueError, RecursionError):
        return key
    found = content.get("image_id") if isinstance(content, dict) else None
    return found if isinstance(found, (int, str)) and not isinstance(found, bool) else key


def _image(stored: StoredImage | None) -> torch.Tensor:
    return black(None) if stored is None else stored.image
