"""Seconds of an update on any number of GPUs, by a model: what more of them are worth, and what should change on the way.

Nothing is measured here. What is moved when is DeepSpeed 0.19.8's as ``engine.zero`` sets it up; collectives are ``network``'s;
the speed of a device is the one that a user measured, else an H100's, scaled from what one was measured to take for DAT-T
(docs/benchmarks/h100.md). Left out: stragglers, evaluation, saves, waiting for data, and what communication beside computation
takes from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dattrain.engine.precision import REDUCE_BUCKET, STAGE_0_BUCKET
from dattrain.errors import ConfigError
from dattrain.planning.network import Network, given, ring_bytes

PERSISTENT = 100_000
"""Elements up to which stage 3 leaves a weight whole on every device (DeepSpeed's ``stage3_param_persistence_threshold``)."""


@dataclass(frozen=True)
class Constants(Network):
    """What the model takes for granted, each field with its source in the metadata."""

    device_ms_per_gflop: float = given(
        30.3 / (128 * 4.589),
        "measured on an H100 (h100.md): DAT-T, 128 images, bf16, compiled: kernels of 30.3 ms forward and backward. Assumed: others "
        "take as long per FLOP of forward",
    )
    eager_us_per_operation: float = given(
        128 / 1086 / 816 * 1e6,
        "measured there: an update of DAT-T at 1,086 images/s, 816 operations; assumed: all of it is the host launching them",
    )
    compiled_us_per_operation: float = given(
        128 / 1418 / 816 * 1e6, "likewise with train.compile=block, 1,418 images/s"
    )
    graph_us_per_operation: float = given(
        3.4,
        "train.cuda_graphs: NVIDIA, Getting Started with CUDA Graphs (V100): 3.4 us for each short kernel of a graph; not measured here",
    )
    backward_share: float = given(2 / 3, "assumed: backward is twice forward's work")
    memory_tb_s: float = given(
        2.97, "measured there: copies; the optimizer is bound by it, 28 bytes a parameter, 12 for the average"
    )
    agreements: float = given(
        4.0, "small all-reduces of an update: two norms and an overflow (DeepSpeed), the status (ours)"
    )
    images_per_core_s: float = given(
        552.0,
        "measured (data-cpu.md): decoded, cropped and RandAugmented per second of a core of an AMD EPYC",
    )


@dataclass(frozen=True)
class Layer:
    """A module's own weights and work."""

    elements: tuple[int, ...]
    share: float
    """Of the network's FLOPs."""


@dataclass(frozen=True)
class Work:
    """What is computed and moved, whatever the devices are."""

    global_batch: int
    layers: tuple[Layer, ...]
    """In the order of the modules, which is forward's."""
    flops: float
    """Of an image, forward."""
    operations: int
    """Of forward and backward, that write something: what a host must launch."""
    element_bytes: int = 4
    """Of a weight or gradient between devices."""
    recomputed: float = 1.0
    averaged: bool = False

    @property
    def elements(self) -> int:
        """Weights in all."""
        return sum(sum(layer.elements) for layer in self.layers)


@dataclass(frozen=True)
class Layout:
    """How an update is divided."""

    world: int
    per_node: int
    micro_batch: int
    stage: int
    bucket: int = REDUCE_BUCKET


@dataclass(frozen=True)
class Rate:
    """Seconds that a device takes for a micro-batch, by its images.

    Between the points on a line; beyond the last as fast per image as there; below the first no faster, as where the host is
    what takes the time.
    """

    points: tuple[tuple[float, float], ...]
    """Images and seconds, ascending."""
    source: str

    def seconds(self, images: float) -> float:
        """Forward and backward of a micro-batch of ``images``."""
        (first, least), (last, most) = self.points[0], self.points[-1]
        if images <= first:
            return least
        if images >= last:
            return most * images / last
        for (low, before), (high, after) in zip(self.points, self.points[1:]):
            if images <= high:
                return before + (after - before) * (images - low) / (high - low)
        raise AssertionError("points ascend")

    @classmethod
    def measured(cls, rates: Sequence[tuple[int, float]]) -> Rate:
        """From images/s of one device by micro-batch."""
        return cls(tuple((float(m), m / rate) for m, rate in sorted(rates)), "given")

    @classmethod
    def assumed(cls, work: Work, constants: Constants, *, compile: str, cuda_graphs: bool) -> Rate:
        """The host launches or the device computes, whichever takes longer."""
        image = constants.device_ms_per_gflop * 1e-3 * work.flops / 1e9 * work.recomputed
        each, how = constants.eager_us_per_operation, "eager"
        if compile != "none":
            each, how = constants.compiled_us_per_operation, f"train.compile={compile}"
        if cuda_graphs:
            each, how = constants.graph_us_per_operation, "train.cuda_graphs"
        launching = each * 1e-6 * work.operations * work.recomputed
        words = (
            f"assumed: {image * 1e3:.3g} ms an image, at least {launching * 1e3:.3g} ms a micro-batch ({how})"
        )
        return cls(((launching / image, launching),), words)


@dataclass(frozen=True)
class Update:
    """Seconds of an update by cause, on every device; what is hidden behind computation is not in them."""

    compute: float
    reduction: float
    """Gradients: what backward waits for, and what is left after it."""
    weights: float
    """All-gathers: of new weights after the step (stages 1 and 2), of what a layer needs (3)."""
    optimizer: float
    agreement: float
    moved: float
    """Seconds of communication in all, hidden or not."""
    sent: float
    """Bytes that a device sends, counted as rings send them."""

    @property
    def seconds(self) -> float:
        """Together."""
        return self.compute + self.reduction + self.weights + self.optimizer + self.agreement


def update(work: Work, layout: Layout, rate: Rate, constants: Constants) -> Update:
    """Time an update.

    Raises:
        ConfigError: the global batch does not divide into such micro-batches.
    """
    world, per_node, stage = layout.world, layout.per_node, layout.stage
    accumulation, rest = divmod(work.global_batch, world * layout.micro_batch)
    if rest or not accumulation:
        raise ConfigError(
            f"{work.global_batch} samples are no multiple of {world} devices x {layout.micro_batch}"
        )
    one = rate.seconds(layout.micro_batch)
    size = float(work.elements * work.element_bytes)
    share = 1 if stage == 0 else world
    optimizer = work.elements / share * (28 + 12 * work.averaged) / (constants.memory_tb_s * 1e12)
    if world == 1:
        return Update(accumulation * one, 0.0, 0.0, optimizer, 0.0, 0.0, 0.0)
    agreement = constants.agreements * constants.all_reduce(64, world, per_node)

    def all_reduce(elements: int) -> float:
        return constants.all_reduce(elements * work.element_bytes, world, per_node)

    def half(elements: int) -> float:
        return constants.all_gather(elements * work.element_bytes, world, per_node)

    backward = one * constants.backward_share
    filled = list(buckets(work.layers, layout.bucket))
    if stage == 0:
        # One flat copy after backward: nothing is hidden.
        pieces = [
            min(STAGE_0_BUCKET, work.elements - done) for done in range(0, work.elements, STAGE_0_BUCKET)
        ]
        moved = reduction = sum(all_reduce(piece) for piece in pieces)
        weights, sent = 0.0, ring_bytes(size, world, 2)
    elif stage < 3:
        # Whole buckets are all-reduced, though a device keeps its part alone (use_multi_rank_bucket_allreduce); stage 1 does
        # so in the last backward pass of an update, stage 2 in each.
        passes = 1 if stage == 1 else accumulation
        reduction = passes * exposed(filled, backward, all_reduce, waits=True)
        weights = half(work.elements)
        moved = passes * sum(all_reduce(elements) for elements, _ in filled) + weights
        sent = passes * ring_bytes(size, world, 2) + ring_bytes(size, world, 1)
    else:
        reduction = accumulation * exposed(filled, backward, half, waits=False)
        large = [
            (sum(e for e in layer.elements if e > PERSISTENT), layer.share)
            for layer in work.layers
        ]  # fmt: skip
        kept = work.elements - sum(elements for elements, _ in large)
        forward = one - backward
        weights = accumulation * _gathered(large, forward, half) + half(kept)
        moved = accumulation * sum(half(elements) for elements, _ in filled)
        moved += accumulation * sum(half(elements) for elements, _ in large if elements) + half(kept)
        sent = accumulation * ring_bytes(size + (size - kept * work.element_bytes), world, 1)
        sent += ring_bytes(kept * work.element_bytes, world, 1)
    return Update(accumulation * one, reduction, weights, optimizer, agreement, moved + agreement, sent)


def buckets(layers: Sequence[Layer], most: int) -> Iterator[tuple[int, float]]:
    """Elements of each reduction, and the share of backward that is computed until it may begin since the one before.

    Backward takes the layers from the last; a bucket is sent when the next gradient would overfill it, and a weight larger than a
    bucket by itself, as DeepSpeed has it. Backward's work is shared out as forward's FLOPs are.
    """
    held, share = 0, 0.0
    for layer in reversed(layers):
        share += layer.share
        for elements in reversed(layer.elements):
            if held and held + elements > most:
                yield held, share
                held, share = 0, 0.0
            held += elements
    if held or share:
        yield held, share


def exposed(
    filled: Sequence[tuple[int, float]], backward: float, reduce: Callable[[int], float], *, waits: bool
) -> float:
    """Seconds by which reducing beside backward makes it longer, the last bucket's included.

    Args:
        waits: before a bucket is sent, backward waits for the one before it (stages 1 and 2 have two buffers).
    """
    now = end = 0.0
    for elements, share in filled:
        now += share * backward
        if waits:
            now = max(now, end)
        end = max(now, end) + reduce(elements)
    return max(now, end) - backward


def _gathered(large: Sequence[tuple[int, float]], forward: float, gather: Callable[[int], float]) -> float:
    """Seconds by which forward is longer for waiting for its weights, which are fetched ahead layer by layer."""
    now = end = 0.0
    for elements, share in large:
        if elements:
            end += gather(elements)
            now = max(now, end)
        now += share * forward
    return now - forward
