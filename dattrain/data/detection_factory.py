"""Makes the loaders of a detection recipe, as ``dense_factory`` those of segmentation: the same order, set, classes and workers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from dattrain.config.derive import micro_batch
from dattrain.config.schema import Config
from dattrain.data.annotations.kinds import needs_masks, requires_masks
from dattrain.data.aspect_groups import grouped, padded_shares
from dattrain.data.augment.detection_plan import DetectionPlan, draw, with_partners
from dattrain.data.classes import Classes
from dattrain.data.decode.detection import DetectionDecoder, EncodedObjects, fetch, has_object
from dattrain.data.dense_factory import check_labelled, largest, padded_crop
from dattrain.data.detection_batch import GRID, DetectionBatch, bytes_of
from dattrain.data.factory import open_split, ordered_loader, shared_buffer, start_workers
from dattrain.data.feed import BatchRequest, EvalFeed, RankShare
from dattrain.data.loader import Decoder, EvalLoader, TrainLoader
from dattrain.data.order import Order
from dattrain.data.source.dataset import Dataset
from dattrain.data.workers import Workers
from dattrain.errors import UserError

log = logging.getLogger(__name__)

_MEASURED = 512
"""Samples of which it is told how much of their micro-batches is padding."""
_OBJECTS = 32
"""Of an image, for which a worker's slot has room; batches of more take memory of their own."""


def train_loader(
    config: Config, *, rank: int, world: int, samples_seen: int, device: torch.device
) -> TrainLoader[DetectionBatch]:
    """The training loader of one rank, from ``samples_seen`` on; its workers start at once.

    Raises:
        ConfigError: no ``data.train``; classes that do not fit the head; a batch that does not divide.
        UserError: nothing there, no objects in it or none with the masks that are needed, or a shard that does not fit its index.
    """
    share = RankShare(config.train.global_batch, micro_batch(config, world), rank, world, samples_seen)
    if rank == 0:
        for told in (padded_crop(config.geometry), _smaller_micro_batch(config, world)):
            if told:
                log.warning("%s", told)

    def decoder(dataset: Dataset, order: Order) -> Decoder[DetectionBatch]:
        _check_masks(config, dataset)
        feed = DetectionFeed(config, dataset, order, share)
        _check_objects(config, "train", dataset, feed.request(0)[0])
        if rank == 0 and config.geometry.crop is None and share.micro_batch > 1:
            _tell_padding(feed)

        def read(number: int) -> EncodedObjects:
            return fetch(dataset, *feed.request(number), skip_bad=config.data.on_bad == "skip")

        masks = needs_masks(config.task.kind, config.task.head)
        side = GRID if masks else 0
        images = share.micro_batch, *largest(config.geometry)
        nbytes = bytes_of(images, (share.micro_batch * _OBJECTS, side, side))
        need = masks or config.geometry.copy_paste > 0
        return _decoder(config, read, device, masks=masks, need_masks=need, nbytes=nbytes)

    return ordered_loader(config, share, decoder, device)


def eval_loader(
    config: Config, classes: Classes, *, rank: int, world: int, device: torch.device
) -> EvalLoader[DetectionBatch]:
    """The evaluation loader of one rank over ``data.val``; its workers start when it is iterated.

    A batch is one image as it was stored, with its ``truth``, or has none (0 x 3 x 32 x 32), so that all ranks have as many.

    Args:
        classes: of the network: ``TrainLoader.classes``, or those of a run or weights file; those of the set are asked for by
            name.

    Raises:
        ConfigError: no ``data.val``, or classes that do not fit the head.
        UserError: nothing there, no objects in it, a class that the network has not, or a shard that does not fit its index.
    """
    dataset, _ = open_split(config, "val", classes, rank=rank, world=world)
    feed = EvalFeed(dataset.counts, 1, rank, world)

    def read(number: int) -> EncodedObjects:
        return fetch(dataset, feed.request(number), None, skip_bad=config.data.on_bad == "skip")

    # What can be listed may still not be there to be read: an evaluation would find that out only after an epoch.
    read(0)
    _check_objects(config, "val", dataset, feed.request(0))

    def decoder() -> Decoder[DetectionBatch]:
        # As of segmentation: a larger image goes through /dev/shm.
        side = config.geometry.long_side
        masks = needs_masks(config.task.kind, config.task.head)
        nbytes = bytes_of((1, side, side), (0, 0, 0))
        return _decoder(
            config,
            read,
            device,
            masks=masks,
            need_masks=requires_masks(config, "val"),
            nbytes=nbytes,
            count=len(feed),
        )

    return EvalLoader(dataset, feed, decoder, device)


@dataclass
class DetectionFeed:
    """Micro-batches of one rank, for ever: which samples each has, and what is done to them.

    Both are functions of the number alone; the order of an update's slots is kept until another is asked for.
    """

    config: Config
    dataset: Dataset
    order: Order
    share: RankShare
    _slots: tuple[int, NDArray[np.int64]] = field(default=(-1, np.zeros(0, dtype=np.int64)), repr=False)

    @property
    def groups(self) -> bool:
        """Whether images are divided by orientation: crops of one size are not padded."""
        geometry = self.config.geometry
        return geometry.group_aspect and geometry.crop is None and self.share.micro_batch > 1

    def request(self, number: int) -> tuple[BatchRequest, DetectionPlan]:
        """Micro-batch ``number`` since ``samples_seen``."""
        train, geometry, share = self.config.train, self.config.geometry, self.share
        seen, start = share.place(number)
        own = self.slots(seen)[start : start + share.micro_batch]
        positions, partner = with_partners(own, geometry.copy_paste, train.seed, seen, share.global_batch)
        plan = draw(geometry, self.config.augment, train.seed, positions, partner)
        return BatchRequest(positions, *self.order.locate(positions), None), plan

    def shapes(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Height and width of the images at these positions in training, without reading them: B x 2; zeros where the set does not say."""
        config = self.config
        plan = draw(config.geometry, config.augment, config.train.seed, positions)
        places = zip(*(numbers.tolist() for numbers in self.order.locate(positions)))
        sizes = (self.dataset.image_size(*place) for place in places)
        return np.asarray(
            [plan.placement(i, *size).shape if all(size) else (0, 0) for i, size in enumerate(sizes)]
        )

    def slots(self, seen: int) -> NDArray[np.int64]:
        """The positions of the update after ``seen`` samples, each ``micro_batch`` of which are one: the same for every rank.

        A sample keeps its position, and so its draws, whoever shares its micro-batch.
        """
        if self._slots[0] != seen:
            positions = self.order.batch_positions(seen, self.share.global_batch)
            if self.groups:
                height, width = self.shapes(positions).T
                positions = positions[grouped(height > width, self.share.micro_batch)]
            self._slots = seen, positions
        return self._slots[1]


def _tell_padding(feed: DetectionFeed) -> None:
    """Log how much of the first micro-batches is padding, or that the set does not say."""
    share = feed.share
    count = max(1, _MEASURED // share.global_batch)
    firsts = (share.samples_seen + number * share.global_batch for number in range(count))
    slots = [feed.order.batch_positions(first, share.global_batch) for first in firsts]
    shapes = feed.shapes(np.concatenate(slots))
    if not shapes.all():
        log.warning(
            "geometry.group_aspect: data.train=%s does not say of all of its images how large they are, and those count as lying; "
            "shards that `dattrain data pack` wrote say it",
            feed.dataset.name,
        )
        return
    apart, mixed = padded_shares(np.split(shapes, count), share.micro_batch, feed.config.geometry.pad_to)
    log.info(
        "padding: %.1f %% of the pixels of micro-batches, %.1f %% %s geometry.group_aspect (by the first %d updates)",
        100 * (apart if feed.groups else mixed),
        100 * (mixed if feed.groups else apart),
        "without" if feed.groups else "with",
        count,
    )


def _smaller_micro_batch(config: Config, world: int) -> str:
    """What to say where devices have fewer images at a time than the recipe: losses are divided by what a micro-batch holds."""
    own, stated = micro_batch(config, world), config.train.micro_batch
    if stated == "auto" or own == stated:
        return ""
    return (
        f"train.micro_batch={stated} on {world} devices with train.global_batch={config.train.global_batch} is {own}: a detector's losses are "
        f"divided by what a micro-batch holds, so this trains otherwise than the recipe says; use {config.train.global_batch // stated or 1} devices or fewer"
    )


def _check_masks(config: Config, dataset: Dataset) -> None:
    """Refuse to paste objects that have no masks; a head that needs masks has refused them before. Raises UserError."""
    if config.geometry.copy_paste and dataset.maskless and config.data.on_bad == "error":
        raise UserError(
            f"geometry.copy_paste={config.geometry.copy_paste} pastes objects by their masks, and data.train={dataset.name} has "
            f"{dataset.maskless}; set geometry.copy_paste=0, or data.on_bad=skip to go on without images that have such objects"
        )


def _check_objects(config: Config, split: str, dataset: Dataset, first: BatchRequest) -> None:
    """Refuse a set without objects, of which nothing would be learnt to the end. Raises UserError."""
    check_labelled(
        config,
        dataset,
        first,
        lambda sample: has_object(sample, dataset.numbers, training=split == "train"),
        lambda samples: (
            f"data.{split}={dataset.name}: none of {samples} has an object that is no crowd"
            + (", of a pixel or more, and not marked `ignore`" if split == "train" else "")
        ),
        "without objects",
    )


def _decoder(
    config: Config,
    read: Callable[[int], EncodedObjects],
    device: torch.device,
    *,
    masks: bool,
    need_masks: bool,
    nbytes: int,
    count: int | None = None,
) -> Workers[DetectionBatch]:
    """The CPU's decoder, at work."""
    decoder = DetectionDecoder(
        read,
        masks=masks,
        need_masks=need_masks,
        pad_to=config.geometry.pad_to,
        skip_bad=config.data.on_bad == "skip",
        buffer=shared_buffer(config, nbytes),
    )
    return start_workers(config, decoder, device, count=count)
