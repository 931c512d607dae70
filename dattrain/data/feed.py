"""From the number of a micro-batch to encoded images: what both decoders share.

A feed is stateless: asked for micro-batch ``k`` of this rank it computes the positions, their samples and their plan,
and reads the bytes. So any process can serve any micro-batch, and resuming is starting at another number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dattrain.config.data_sections import Augment
from dattrain.data.augment.plan import AugmentPlan, draw, mates
from dattrain.data.order import Order
from dattrain.data.source.dataset import NO_LABEL, BadSample, Dataset, Sample
from dattrain.errors import UserError


@dataclass(frozen=True)
class BatchRequest:
    """The samples of one micro-batch: global positions, shard and sample numbers (B int64 each), and the plan.

    In training the first ``count`` of them are trained on; the others are decoded to be mixed into those.
    """

    positions: NDArray[np.int64]
    shards: NDArray[np.int64]
    samples: NDArray[np.int64]
    plan: AugmentPlan | None

    @property
    def count(self) -> int:
        """Samples that are trained on, or evaluated."""
        return len(self.positions) if self.plan is None else len(self.plan.mix)


@dataclass(frozen=True)
class Encoded:
    """Encoded images of one micro-batch.

    ``data`` is None for a bad sample, whose reason is in ``bad`` by place; ``where`` names file, key and offset.
    """

    request: BatchRequest
    data: list[bytes | None]
    labels: NDArray[np.int64]
    keys: list[str]
    where: list[str]
    bad: dict[int, str]


@dataclass(frozen=True)
class RankShare:
    """The part of each global batch that one rank takes, in micro-batches, from ``samples_seen`` on.

    ``micro_batch * world`` divides ``global_batch`` (``config.derive.micro_batch`` gives such a number).
    """

    global_batch: int
    micro_batch: int
    rank: int
    world: int
    samples_seen: int

    @property
    def accumulation(self) -> int:
        """Micro-batches per update."""
        return self.global_batch // self.world // self.micro_batch

    def place(self, number: int) -> tuple[int, int]:
        """Samples seen before the update of micro-batch ``number``, and the slot of the global batch that it begins at."""
        update, part = divmod(number, self.accumulation)
        first = (self.rank * self.accumulation + part) * self.micro_batch
        return self.samples_seen + update * self.global_batch, first


@dataclass
class TrainFeed:
    """Micro-batches of one rank, for ever."""

    order: Order
    augment: Augment
    seed: int
    size: tuple[int, int]
    share: RankShare

    @property
    def most(self) -> int:
        """Images of the largest micro-batch, with the partners that lie outside of it."""
        count = self.share.micro_batch
        return count if count % self.augment.group == 0 else 2 * count

    def request(self, number: int) -> BatchRequest:
        """Micro-batch ``number`` since ``samples_seen``."""
        seen, start = self.share.place(number)
        slots = self.order.batch_positions(seen, self.share.global_batch)
        positions, groups = mates(slots, start, start + self.share.micro_batch, self.augment.group)
        shards, samples = self.order.locate(positions)
        plan = draw(self.augment, self.seed, positions, self.size, groups)
        return BatchRequest(positions, shards, samples, plan)


@dataclass
class EvalFeed:
    """The batches of one rank over a whole set: it takes ``range(rank, n, world)``.

    All ranks have the same number of batches, so that they can reduce together after each; the last ones may be shorter or empty.
    """

    counts: NDArray[np.int64]
    batch: int
    rank: int
    world: int

    @property
    def most(self) -> int:
        """Images of the largest batch."""
        return self.batch

    def __len__(self) -> int:
        longest = -(-int(self.counts.sum()) // self.world)
        return -(-longest // self.batch)

    def request(self, number: int) -> BatchRequest:
        """Batch ``number``."""
        own = range(self.rank, int(self.counts.sum()), self.world)
        positions = np.asarray(own[number * self.batch : (number + 1) * self.batch], dtype=np.int64)
        ends = np.cumsum(self.counts)
        shards = np.searchsorted(ends, positions, side="right")
        return BatchRequest(positions, shards, positions - (ends - self.counts)[shards], None)


def fetch(dataset: Dataset, request: BatchRequest, *, num_classes: int, skip_bad: bool) -> Encoded:
    """Read the encoded images of a request, and their labels.

    Args:
        num_classes: labels must be below it.
        skip_bad: note a bad sample and read the others, else raise.

    Raises:
        UserError: a bad sample without ``skip_bad``; always for a damaged shard or a label that does not fit.
    """

    def check(sample: Sample) -> None:
        if sample.label == NO_LABEL:
            raise BadSample(f"{sample.where}: has no label (no .cls member)")
        if not 0 <= sample.label < num_classes:
            raise UserError(
                f"{sample.where}: label {sample.label}, but model.num_classes={num_classes}; "
                "the data set and the head do not fit"
            )

    found = read_samples(dataset, request, check, skip_bad=skip_bad)
    return Encoded(
        request,
        [None if sample is None else sample.data for sample in found.samples],
        np.array([0 if sample is None else sample.label for sample in found.samples], dtype=np.int64),
        found.keys,
        found.where,
        found.bad,
    )


@dataclass(frozen=True)
class Found:
    """What was read of a request: by place the sample (None for a bad one, whose reason is in ``bad``), its key, and where it is."""

    samples: list[Sample | None]
    keys: list[str]
    where: list[str]
    bad: dict[int, str]


def read_samples(
    dataset: Dataset,
    request: BatchRequest,
    check: Callable[[Sample], None] = lambda sample: None,
    *,
    skip_bad: bool,
) -> Found:
    """Read the samples of a request.

    Args:
        check: raises BadSample for a sample that cannot be used, or UserError for one that must not be passed over.
        skip_bad: note a bad sample and read the others, else raise.

    Raises:
        UserError: a bad sample without ``skip_bad``; always for a damaged shard, or as ``check`` raises it.
    """
    n = len(request.positions)
    found = Found([None] * n, [""] * n, [""] * n, {})
    for i, (shard, number) in enumerate(zip(request.shards.tolist(), request.samples.tolist())):
        found.keys[i] = found.where[i] = dataset.key(shard, number)
        try:
            sample = dataset.read(shard, number)
            found.where[i] = sample.where
            check(sample)
            found.samples[i] = sample
        except BadSample as error:
            found.bad[i] = str(error)
            if not skip_bad:
                raise UserError(bad_sample_message(str(error))) from error
    return found


def bad_sample_message(reason: str) -> str:
    """What to tell the user of a bad sample that is an error."""
    return (
        f"{reason}; remove it, or set data.on_bad=skip (of dattrain eval, --on-bad skip) to go on without it "
        "(its place stays, with zero weight)"
    )
