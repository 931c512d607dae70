"""The CPU decoder: a map from the number of a micro-batch to the finished uint8 batch, run by worker processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from dattrain.data.augment.cpu_transforms import eval_image, train_image
from dattrain.data.augment.plan import AugmentPlan, reduction
from dattrain.data.batch import Batch
from dattrain.data.decode import images
from dattrain.data.feed import Encoded, bad_sample_message
from dattrain.data.shared_buffer import SharedBatchBuffer, room
from dattrain.data.worker_progress import note
from dattrain.errors import UserError


@dataclass(frozen=True)
class EvalTransform:
    """Evaluation geometry: see ``augment.eval_geometry``."""

    resize: str
    crop_pct: float
    interpolation: str


class CpuDecoder:
    """Map from the number of a micro-batch to the decoded batch.

    Args:
        read: delivers the encoded images of a micro-batch.
        size: (height, width) of the output.
        skip_bad: keep a bad sample's place with zero weight; else it is an error.
        transform: of evaluation; None in training, where the plan says what is done.
        buffer: where worker processes put their batches; None gives each batch memory of its own.
    """

    def __init__(
        self,
        read: Callable[[int], Encoded],
        *,
        size: tuple[int, int],
        skip_bad: bool,
        transform: EvalTransform | None = None,
        buffer: SharedBatchBuffer | None = None,
    ) -> None:
        self.read = read
        self.buffer = buffer
        self.size = size
        self.skip_bad = skip_bad
        self.transform = transform

    def __call__(self, number: int) -> Batch:
        """Read and decode micro-batch ``number``. Raises UserError as ``read`` does, and as ``decode``."""
        return self.decode(self.read(number))

    def decode(self, encoded: Encoded) -> Batch:
        """Decode what was read. Raises UserError for a bad image without ``skip_bad``."""
        bad = dict(encoded.bad)
        shape = (len(encoded.data), *self.size, 3)
        memory, slot = room(self.buffer, math.prod(shape))
        pixels = memory.view(shape)
        for i, data in enumerate(encoded.data):
            note(encoded.where[i])
            reason = None if data is None else decode_sample(encoded, i, self.transform, pixels[i])
            if reason is not None:
                if not self.skip_bad:
                    raise UserError(bad_sample_message(reason))
                bad[i] = reason
            if i in bad:
                pixels[i].zero_()
        batch = assemble(pixels.permute(0, 3, 1, 2), encoded, bad)
        return batch if slot is None else replace(batch, slot=slot)


def decode_sample(encoded: Encoded, i: int, transform: EvalTransform | None, out: torch.Tensor) -> str | None:
    """Decode image ``i`` and carry out its plan, or the evaluation's transform, into ``out`` (H x W x 3 uint8).

    Returns what is wrong with the image, and where it is; None where nothing is.
    """
    data, plan = encoded.data[i], encoded.request.plan
    assert data is not None
    try:
        if plan is not None:
            decode_training(data, plan, i, out)
        elif transform is not None:
            # In full: figures of an evaluation are compared with others' to the digit.
            image = images.decode(data)
            size = out.shape[0], out.shape[1]
            eval_image(
                image,
                size,
                out,
                policy=transform.resize,
                crop_pct=transform.crop_pct,
                interpolation=transform.interpolation,
            )
    except images.BadImage as error:
        return f"{encoded.where[i]}: {error}"
    return None


def decode_training(data: bytes, plan: AugmentPlan, i: int, out: torch.Tensor) -> None:
    """Decode an image, reduced where its crop allows it, and carry out sample ``i`` of the plan into ``out`` (H x W x 3 uint8).

    Raises:
        BadImage: see ``images.decode``.
    """

    def factor(height: int, width: int) -> int:
        # A crop is no larger than its image, and few images are large enough.
        return 1 if reduction((height, width), plan.size) == 1 else plan.region(i, height, width).factor

    found = images.decode_reduced(data, factor)
    train_image(found.pixels, plan, i, out, size=found.size, factor=found.factor)


def assemble(pixels: torch.Tensor, encoded: Encoded, bad: dict[int, str]) -> Batch:
    """The batch of decoded ``pixels`` (B x 3 x H x W); bad samples get label 0 and weight 0, and are not mixed."""
    count = encoded.request.count
    good = np.ones(len(encoded.keys), dtype=np.bool_)
    labels = encoded.labels.copy()
    plan = encoded.request.plan
    if bad:
        good[list(bad)] = False
        labels[list(bad)] = 0
        if plan is not None:
            plan = plan.without_mixing(~good)
    return Batch(
        images=pixels,
        labels=torch.from_numpy(labels),
        weight=torch.from_numpy(good[:count].astype(np.float32)),
        position=torch.from_numpy(encoded.request.positions[:count]),
        keys=encoded.keys[:count],
        plan=plan,
        # A partner from elsewhere is counted where it is trained on.
        bad=tuple((encoded.keys[i], bad[i]) for i in sorted(bad) if i < count),
    )
