"""Makes the loaders of a dense recipe, as ``factory`` those of classification: the same order, set, classes and workers."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable

import torch

from dattrain.config.data_sections import Geometry
from dattrain.config.derive import micro_batch
from dattrain.config.schema import Config
from dattrain.config.values import as_pair
from dattrain.data.annotations.map_folder import ADE_NAMES
from dattrain.data.annotations.semantic import VOID
from dattrain.data.augment.dense_plan import DensePlan, draw
from dattrain.data.classes import Classes
from dattrain.data.decode.dense import EncodedMaps, SegmentationDecoder, fetch, labelled
from dattrain.data.dense_batch import SegmentationBatch, bytes_of
from dattrain.data.factory import open_split, ordered_loader, shared_buffer, start_workers
from dattrain.data.feed import BatchRequest, EvalFeed, RankShare, bad_sample_message
from dattrain.data.loader import Decoder, EvalLoader, TrainLoader
from dattrain.data.order import Order
from dattrain.data.source.dataset import BadSample, Dataset, Sample, locate
from dattrain.data.workers import Workers
from dattrain.errors import UserError
from dattrain.files import counted

log = logging.getLogger(__name__)

_LOOKED_AT = 1000
"""Samples in which a labelled pixel is looked for, in sets whose first ones have none."""


def train_loader(
    config: Config, *, rank: int, world: int, samples_seen: int, device: torch.device
) -> TrainLoader[SegmentationBatch]:
    """The training loader of one rank, from ``samples_seen`` on; its workers start at once.

    Raises:
        ConfigError: no ``data.train``; classes that do not fit the head; a batch that does not divide.
        UserError: nothing there, no maps in it, or a shard that does not fit its index.
    """
    share = RankShare(config.train.global_batch, micro_batch(config, world), rank, world, samples_seen)
    if rank == 0 and (told := padded_crop(config.geometry)):
        log.warning("%s", told)

    def decoder(dataset: Dataset, order: Order) -> Decoder[SegmentationBatch]:
        _check_labels(config, "train", dataset, request_of(config, order, share, 0)[0])

        def read(number: int) -> EncodedMaps:
            request, plan = request_of(config, order, share, number)
            return fetch(dataset, request, plan, skip_bad=config.data.on_bad == "skip")

        return _train_decoder(config, read, device, share.micro_batch)

    return ordered_loader(config, share, decoder, device)


def eval_loader(
    config: Config, classes: Classes, *, rank: int, world: int, device: torch.device
) -> EvalLoader[SegmentationBatch]:
    """The evaluation loader of one rank over ``data.val``; its workers start when it is iterated.

    A batch is one image as it was stored, with its map, or has none (0 x 3 x 32 x 32), so that all ranks have as many.

    Args:
        classes: of the network: ``TrainLoader.classes``, or those of a run or weights file; those of the set are asked for by
            name.

    Raises:
        ConfigError: no ``data.val``, or classes that do not fit the head.
        UserError: nothing there, no maps in it, a class that the network has not, or a shard that does not fit its index.
    """
    dataset, _ = open_split(config, "val", classes, rank=rank, world=world)
    feed = EvalFeed(dataset.counts, 1, rank, world)

    def read(number: int) -> EncodedMaps:
        return fetch(dataset, feed.request(number), None, skip_bad=config.data.on_bad == "skip")

    # What can be listed may still not be there to be read: an evaluation would find that out only after an epoch.
    read(0)
    _check_labels(config, "val", dataset, feed.request(0))

    def decoder() -> Decoder[SegmentationBatch]:
        # Stored images are as large as they like. Pages of a slot that no image needs are never touched; a larger image goes
        # through /dev/shm, which containers keep small.
        side = config.geometry.long_side
        return _decoder(config, read, device, nbytes=bytes_of((1, side, side)), count=len(feed))

    return EvalLoader(dataset, feed, decoder, device)


def padded_crop(geometry: Geometry) -> str:
    """What to say of a crop that no image can fill; empty where one can."""
    most = int(geometry.long_side * geometry.scale[1])
    if geometry.crop is None or max(as_pair(geometry.crop)) <= most:
        return ""
    return (
        f"geometry.crop={geometry.crop} is larger than any resized image, whose longer side is at most {most} (geometry.long_side="
        f"{geometry.long_side} x {geometry.scale[1]:g} of geometry.scale): a part of every crop is padding, in which nothing is learnt"
    )


def _check_labels(config: Config, split: str, dataset: Dataset, first: BatchRequest) -> None:
    """Refuse a set without a labelled pixel, which would be trained on to the end, with a loss of 0. Raises UserError."""
    check_labelled(
        config,
        dataset,
        first,
        lambda sample: labelled(sample, dataset.numbers),
        lambda samples: (
            f"data.{split}={dataset.name}: no pixel of {samples} has a class; {VOID} is void, and with an {ADE_NAMES} 0 is, too"
        ),
        "void",
    )


def check_labelled(
    config: Config,
    dataset: Dataset,
    first: BatchRequest,
    has_label: Callable[[Sample], bool],
    message: Callable[[str], str],
    kind: str,
) -> None:
    """Refuse a set of which no sample has what is learned.

    The first sample mostly has it. Where those of ``first`` do not, up to ``_LOOKED_AT`` from the whole set are looked at.

    Args:
        has_label: whether a sample has it; raises BadSample.
        message: of the error, given how the samples are called that were looked at.
        kind: what the samples are, if they are not bad ones.

    Raises:
        UserError: not one of them has it; without ``data.on_bad=skip`` also for a bad sample.
    """
    total = int(dataset.counts.sum())
    others = (locate(dataset, item) for item in range(0, total, -(-total // _LOOKED_AT)))
    seen, bad = 0, ""
    for place in itertools.chain(zip(first.shards.tolist(), first.samples.tolist()), others):
        try:
            if has_label(dataset.read(*place)):
                return
        except BadSample as error:
            if config.data.on_bad != "skip":
                raise UserError(bad_sample_message(str(error))) from error
            bad = bad or str(error)
        seen += 1
    which = "its" if total <= _LOOKED_AT else f"{seen:,} of its"
    why = f"; all are {kind}, or bad samples, the first of them: {bad}" if bad else ""
    raise UserError(message(f"{which} {counted(total, 'sample')}") + why)


def request_of(config: Config, order: Order, share: RankShare, number: int) -> tuple[BatchRequest, DensePlan]:
    """Which samples micro-batch ``number`` of a rank has, and what is done to them: a pure function."""
    seen, start = share.place(number)
    positions = order.batch_positions(seen, share.global_batch)[start : start + share.micro_batch]
    plan = draw(config.geometry, config.augment, config.train.seed, positions)
    return BatchRequest(positions, *order.locate(positions), None), plan


def largest(geometry: Geometry) -> tuple[int, int]:
    """Height and width that a training micro-batch has room for: the crop, or the largest whole image, lying.

    Whole images of both orientations together may need more.
    """
    if geometry.crop is not None:
        return as_pair(geometry.crop)
    short = max(geometry.short_sides, default=geometry.short_side)
    height, width = (
        -(-int(side * geometry.scale[1]) // geometry.pad_to) * geometry.pad_to
        for side in (short, geometry.long_side)
    )
    return height, width


def _train_decoder(
    config: Config, read: Callable[[int], EncodedMaps], device: torch.device, micro_batch: int
) -> Decoder[SegmentationBatch]:
    """The decoder that ``data.decoder`` names, at work; evaluation, with one image at a time as it is stored, has the CPU's."""
    data = config.data
    if data.decoder == "dali":
        from dattrain.data.decode.dali_dense import DaliSegmentationDecoder

        return DaliSegmentationDecoder(
            read,
            batch=micro_batch,
            pad_to=config.geometry.pad_to,
            interpolation=config.augment.interpolation,
            skip_bad=data.on_bad == "skip",
            data=data,
            device=device,
            threads=max(1, data.workers),
        )
    height, width = largest(config.geometry)
    return _decoder(config, read, device, nbytes=bytes_of((micro_batch, height, width)))


def _decoder(
    config: Config,
    read: Callable[[int], EncodedMaps],
    device: torch.device,
    *,
    nbytes: int,
    count: int | None = None,
) -> Workers[SegmentationBatch]:
    """The CPU's decoder, at work."""
    decoder = SegmentationDecoder(
        read,
        pad_to=config.geometry.pad_to,
        skip_bad=config.data.on_bad == "skip",
        buffer=shared_buffer(config, nbytes),
    )
    return start_workers(config, decoder, device, count=count)
