"""Makes the loaders of a recipe: order, data set, plan and decoder put together for one rank."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from dattrain.config.derive import check_samples, micro_batch
from dattrain.config.schema import Config
from dattrain.config.values import as_pair
from dattrain.data import identity
from dattrain.data.annotations.kinds import KINDS, background_hint, check_kind, flaws, learned, requires_masks
from dattrain.data.batch import Batch
from dattrain.data.classes import (
    Classes,
    absent,
    bare_numbers,
    canonical,
    check_labels,
    check_sampled_names,
    decide,
    few,
)
from dattrain.data.decode.cpu import CpuDecoder, EvalTransform
from dattrain.data.feed import Encoded, EvalFeed, RankShare, TrainFeed, fetch
from dattrain.data.loader import B, Decoder, EvalLoader, TrainLoader
from dattrain.data.order import Order
from dattrain.data.shared_buffer import SharedBatchBuffer
from dattrain.data.source.dataset import Dataset, ShardDataset, open_dataset
from dattrain.data.source.fields import sampled_class_names
from dattrain.data.source.index import NO_LABEL
from dattrain.data.source.shards import check_train_glob
from dattrain.data.stream import WebStream, stream_classes
from dattrain.data.workers import Workers
from dattrain.errors import ConfigError, UserError

log = logging.getLogger(__name__)

_UPDATES_PER_PREFETCH = 8


def train_loader(
    config: Config,
    *,
    rank: int,
    world: int,
    samples_seen: int,
    device: torch.device,
    img_size: int | tuple[int, int],
) -> TrainLoader[Batch]:
    """The training loader of one rank, from ``samples_seen`` on; its workers start at once.

    Raises:
        ConfigError: no ``data.train``; labels that do not fit the head; a batch that does not divide.
        UserError: nothing there, or a shard that does not fit its index.
    """
    train = config.train
    size = as_pair(img_size)
    share = RankShare(train.global_batch, micro_batch(config, world), rank, world, samples_seen)
    if config.data.reader == "webdataset":
        return _webdataset_loader(config, share, device=device, size=size)

    def decoder(dataset: Dataset, order: Order) -> Decoder[Batch]:
        feed = TrainFeed(order, config.augment, train.seed, size, share)
        return _decoder(config, dataset, feed, size=size, device=device)

    return ordered_loader(config, share, decoder, device)


def ordered_loader(
    config: Config, share: RankShare, decoder: Callable[[Dataset, Order], Decoder[B]], device: torch.device
) -> TrainLoader[B]:
    """The training loader over ``data.train`` in its order, of any task; errors as for ``train_loader``.

    Args:
        decoder: makes what reads a set in an order.
    """
    data = config.data
    dataset, classes = open_split(config, "train", None, rank=share.rank, world=share.world)
    order = Order(
        dataset.counts, seed=config.train.seed, lanes=data.lanes, window=data.window, shuffle=data.shuffle
    )
    check_samples(config, order.samples)
    return TrainLoader(
        decoder(dataset, order),
        classes,
        samples_per_epoch=order.samples,
        identity=identity.of_dataset(dataset),
        device=device,
        before=Prefetch(dataset, order, share) if dataset.prefetches else lambda served: None,
        close=dataset.close,
    )


def eval_loader(
    config: Config,
    classes: Classes,
    *,
    rank: int,
    world: int,
    device: torch.device,
    img_size: int | tuple[int, int],
) -> EvalLoader[Batch]:
    """The evaluation loader of one rank over ``data.val``; its workers start when it is iterated.

    Args:
        classes: of the network: ``TrainLoader.classes``, or those of a run or weights file. Labels of the set that have
            names are asked for by name.

    Raises:
        ConfigError: no ``data.val``, or labels that do not fit the head.
        UserError: nothing there, a class that the network has not, or a shard that does not fit its index.
    """
    dataset, _ = open_split(config, "val", classes, rank=rank, world=world)
    size = as_pair(img_size)
    feed = EvalFeed(dataset.counts, config.eval.batch, rank, world)
    transform = EvalTransform(config.eval.resize, config.eval.crop_pct, config.augment.interpolation)

    # What can be listed may still not be there to be read: an evaluation would find that out only after an epoch.
    fetch(
        dataset, feed.request(0), num_classes=config.model.num_classes, skip_bad=config.data.on_bad == "skip"
    )

    def decoder() -> Decoder[Batch]:
        return _decoder(config, dataset, feed, size=size, device=device, transform=transform, count=len(feed))

    return EvalLoader(dataset, feed, decoder, device)


def open_split(
    config: Config, split: str, classes: Classes | None, *, rank: int, world: int
) -> tuple[Dataset, Classes]:
    """The data set of ``data.train`` or ``data.val``, its labels being class numbers of the network; errors as for the loaders.

    Args:
        classes: of the network; None lets this set or ``data.labels`` decide them.
    """
    data = config.data
    spec = data.train if split == "train" else data.val
    if spec is None:
        raise ConfigError(f"data.{split} is not set; name a folder or pattern of shards, or an image folder")
    dataset = open_dataset(
        spec, cache_dir=data.cache_dir, cache_gb=data.cache_gb, verify=data.verify, rank=rank, world=world
    )
    try:
        kind = config.task.kind
        check_kind(dataset.annotations, KINDS[kind], f"data.{split}={dataset.name}", kind)
        metric = config.checkpoint.metric if split == "val" and kind == "detection" else ""
        bad = flaws(dataset, kind, requires_masks(config, split), metric)
        if bad and data.on_bad == "error":
            raise UserError(
                f"data.{split}: {'; '.join(bad)}. Correct that, or set data.on_bad=skip (of dattrain eval, --on-bad skip) to "
                "go on without what cannot be used"
            )
        if split == "train" and isinstance(dataset, ShardDataset):
            check_train_glob(spec, dataset.shards.paths)
        classes, notes = assign_class_numbers(config, split, dataset, classes)
    except BaseException:
        dataset.close()
        raise
    if rank == 0:
        for line in [*dataset.notes, *bad, *notes]:
            log.warning("%s", line)
    return dataset, classes


def assign_class_numbers(
    config: Config, split: str, dataset: Dataset, classes: Classes | None
) -> tuple[Classes, list[str]]:
    """Give a set the class numbers of the network; returns the network's classes, and what to tell of them.

    The background of a set of objects is a class of a network for segmentation and none of one for detection, where no object may
    have it. Numbers of objects of which nothing says the names are the network's own, from 0 on, in both.

    Args:
        classes: of the network; None lets this set or ``data.labels`` decide them.

    Raises:
        ConfigError: classes or labels that do not fit the head.
        UserError: a class that the network has not.
    """
    data, num_classes, task = config.data, config.model.num_classes, config.task.kind
    what = f"data.{split}={dataset.name}"
    notes = []
    decides = classes is None
    named = None if dataset.classes is None else learned(dataset.classes, task)
    if classes is None:
        names = None if dataset.classes is None or named is None else [dataset.classes[i] for i in named]
        hint = background_hint(dataset.annotations, dataset.classes, num_classes, task)
        classes = decide(names, num_classes, data.labels, what, hint=hint)
    if dataset.classes is not None and named is not None:
        own = Classes(len(dataset.classes), tuple(dataset.classes), "the manifest beside it")
        check_sampled_names(own, sampled_class_names(dataset), what)
        used = named if dataset.used is None else sorted({*named} & {*dataset.used})
        table = np.full(len(dataset.classes), NO_LABEL, dtype=np.int64)
        table[used] = numbers = classes.numbers([dataset.classes[label] for label in used], what)
        if task == "detection":
            # What is found of a class without objects has a number in the file, too.
            for label in {*named} - {*used}:
                if dataset.classes[label] in classes.names:
                    table[label] = classes.names.index(dataset.classes[label])
        dataset.renumber(table)
        if missing := absent(classes, numbers):
            notes.append(
                f"{what}: has images of {len(numbers)} of {classes.count} classes; none of {few(missing)}"
            )
    else:
        said = sampled_class_names(dataset)
        notes += bare_numbers(classes, said, what)
        if decides and not classes.names:
            classes = replace(classes, said=frozenset((label, canonical(name)) for _, label, name in said))
        if dataset.annotations != "none":
            # A class beyond the network's is a bad sample then.
            dataset.renumber(np.arange(num_classes, dtype=np.int64))
    check_labels(dataset.max_label, num_classes, what)
    return classes, notes


class Prefetch:
    """Tells a data set which shards come next, every few updates; called with the number of micro-batches served."""

    def __init__(self, dataset: Dataset, order: Order, share: RankShare) -> None:
        self._dataset, self._order, self._share = dataset, order, share

    def __call__(self, served: int) -> None:
        """Hint, where an update of the right number begins."""
        share = self._share
        if served % (share.accumulation * _UPDATES_PER_PREFETCH) == 0:
            seen, _ = share.place(served)
            shards = self._order.shards_to_prefetch(seen, share.global_batch, share.rank, share.world)
            self._dataset.prefetch(shards)


def _webdataset_loader(
    config: Config, share: RankShare, *, device: torch.device, size: tuple[int, int]
) -> TrainLoader[Batch]:
    data = config.data
    if data.train is None:
        raise ConfigError(
            "data.train is not set; name shards or pipes, as in 'pipe:cat set-{0000..0099}.tar'"
        )
    if data.samples is None:
        raise ConfigError(
            "data.reader=webdataset cannot count the samples of a stream; set data.samples to how many make an epoch"
        )
    classes = stream_classes(config)
    log.warning(
        "data.reader=webdataset is not exact: shards are drawn with replacement, so samples are missed and doubled, and "
        "a resumed run does not see what an uninterrupted one would have seen; data.reader=index is exact"
    )
    stream = WebStream(config, share, size)
    decoder = CpuDecoder(stream.read, size=size, skip_bad=data.on_bad == "skip")
    return TrainLoader(
        start_workers(config, decoder, device),
        classes,
        samples_per_epoch=data.samples,
        identity=identity.of_stream(stream.urls, data.samples),
        device=device,
    )


def _decoder(
    config: Config,
    dataset: Dataset,
    feed: TrainFeed | EvalFeed,
    *,
    size: tuple[int, int],
    device: torch.device,
    transform: EvalTransform | None = None,
    count: int | None = None,
) -> Decoder[Batch]:
    """The decoder that ``data.decoder`` names, at work."""
    data = config.data
    skip_bad = data.on_bad == "skip"

    def read(number: int) -> Encoded:
        return fetch(dataset, feed.request(number), num_classes=config.model.num_classes, skip_bad=skip_bad)

    if data.decoder == "dali":
        from dattrain.data.decode.dali import DaliDecoder

        return DaliDecoder(
            read,
            batch=feed.most,
            size=size,
            skip_bad=skip_bad,
            interpolation=config.augment.interpolation,
            data=data,
            device=device,
            transform=transform,
            count=count,
            threads=max(1, data.workers),
        )
    buffer = shared_buffer(config, feed.most * size[0] * size[1] * 3)
    decoder = CpuDecoder(read, size=size, skip_bad=skip_bad, transform=transform, buffer=buffer)
    return start_workers(config, decoder, device, count=count)


def shared_buffer(config: Config, nbytes: int) -> SharedBatchBuffer:
    """Room for the batches of all workers, ``nbytes`` each."""
    # A worker holds ``prefetch`` batches ready; one is in the trainer's hands and one on its way.
    return SharedBatchBuffer(max(1, config.data.workers), config.data.prefetch + 2, nbytes)


def start_workers(
    config: Config, decode: Callable[[int], B], device: torch.device, *, count: int | None = None
) -> Workers[B]:
    """The workers of a loader; ``count`` batches, None without end."""
    return Workers(
        decode,
        count=count,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        pin=device.type == "cuda",
        # Fewer seconds than the watchdog's, which could not say which worker gives nothing.
        patience=0.75 * config.train.health.stall_seconds,
        unit="micro-batch",
    )
