"""The loaders: order, data set, plan and decoder put together for one rank."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from dattrain.config.schema import Config
from dattrain.data import identity
from dattrain.data.batch import Batch
from dattrain.data.classes import Classes, absent, bare_numbers, canonical, decide, few, hold
from dattrain.data.decode.cpu import CpuDecoder, EvalTransform
from dattrain.data.feed import Encoded, EvalFeed, TrainFeed, fetch
from dattrain.data.order import Order
from dattrain.data.shared_buffer import Ring
from dattrain.data.source.dataset import Dataset, ShardDataset, open_dataset
from dattrain.data.source.fields import said_by_samples
from dattrain.data.source.index import NO_LABEL
from dattrain.data.source.shards import check_train_glob
from dattrain.data.workers import Workers
from dattrain.errors import ConfigError

if TYPE_CHECKING:
    from dattrain.data.stream import StreamLoader

log = logging.getLogger(__name__)

_NAMES_KEPT = 1000
_UPDATES_PER_HINT = 8
_SHARDS_PER_HINT = 8


class Decoder(Protocol):
    """An iterator of decoded batches. Raises UserError from ``__next__``."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def close(self) -> None:
        """End processes and threads."""
        ...


@dataclass
class Bad:
    """Skipped samples of this rank: how many times one was skipped, and (key, reason) of the first thousand."""

    count: int = 0
    samples: list[tuple[str, str]] = field(default_factory=list)

    def add(self, samples: tuple[tuple[str, str], ...]) -> None:
        """Count and name more."""
        self.count += len(samples)
        self.samples += samples[: _NAMES_KEPT - len(self.samples)]


class TrainLoader:
    """Micro-batches of one rank, for ever. See docs/design/contracts.md.

    Attributes:
        samples_per_epoch: samples of the set.
        num_classes_seen: one more than the largest label of the set, where its catalogue says; else None.
        classes: what the network's outputs stand for, as this training set or ``data.labels`` decides.
        identity: of the set (``dattrain.data.identity``).
        bad: skipped samples.
        exact: whether order and resume are a function of the position (``data.reader: index``).
    """

    exact = True

    def __init__(
        self, dataset: Dataset, classes: Classes, decoder: Decoder, *, feed: TrainFeed, device: torch.device
    ) -> None:
        self.dataset = dataset
        self.classes = classes
        self.feed = feed
        self.samples_per_epoch = feed.order.samples
        self.num_classes_seen = dataset.max_label + 1 or None
        self.identity = identity.of_dataset(dataset)
        self.bad = Bad()
        self._decoder = decoder
        self._to_device = ToDevice(device)
        self._waited = 0.0
        self._served = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self._hint()
        start = time.perf_counter()
        batch = next(self._decoder)
        self._waited += time.perf_counter() - start
        self._served += 1
        self.bad.add(batch.bad)
        return self._to_device(batch)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep besides the position: nothing, where the order is a function of it."""
        return {}

    @property
    def wait_s(self) -> float:
        """Seconds spent waiting for data since this was last read."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """End the workers and release files."""
        self._decoder.close()
        self.dataset.close()

    def _hint(self) -> None:
        if not self.dataset.fetches:
            return
        feed = self.feed
        update, rest = divmod(self._served, feed.global_batch // feed.world // feed.micro_batch)
        if rest == 0 and update % _UPDATES_PER_HINT == 0:
            seen = feed.samples_seen + update * feed.global_batch
            self.dataset.ahead(feed.order.shards_ahead(seen, feed.global_batch, feed.rank, feed.world))


class EvalLoader:
    """Batches of one rank over the whole evaluation set, each image once over all ranks, in a fixed order.

    Every rank yields ``len(loader)`` batches; the last ones may be shorter or empty. It can be iterated repeatedly.

    Attributes:
        samples: of the whole set.
        bad: skipped samples.
    """

    def __init__(
        self, config: Config, dataset: Dataset, feed: EvalFeed, size: tuple[int, int], device: torch.device
    ) -> None:
        self.dataset = dataset
        self.samples = int(dataset.counts.sum())
        self.bad = Bad()
        self._config = config
        self._feed = feed
        self._size = size
        self._to_device = ToDevice(device)
        self._hinted = -1

    def __len__(self) -> int:
        return len(self._feed)

    def __iter__(self) -> Iterator[Batch]:
        config = self._config
        workers = _decoder(
            config,
            self.dataset,
            self._feed,
            size=self._size,
            device=self._to_device.device,
            transform=EvalTransform(config.eval.resize, config.eval.crop_pct, config.augment.interpolation),
            count=len(self),
        )
        try:
            for number in range(len(self)):
                self._hint(number)
                batch = next(workers)
                self.bad.add(batch.bad)
                yield self._to_device(batch)
        finally:
            workers.close()

    def _hint(self, number: int) -> None:
        if not self.dataset.fetches:
            return
        first = self._feed.request(number).shards[:1].tolist()
        if first and first[0] != self._hinted:
            self._hinted = first[0]
            self.dataset.ahead(range(first[0], min(first[0] + _SHARDS_PER_HINT, len(self.dataset.counts))))

    def close(self) -> None:
        """Release files."""
        self.dataset.close()


def train_loader(
    config: Config,
    *,
    rank: int,
    world: int,
    samples_seen: int,
    device: torch.device,
    img_size: int | tuple[int, int],
    states: Sequence[Mapping[str, Any]] | None = None,
) -> TrainLoader | StreamLoader:
    """The training loader of one rank, going on at ``samples_seen``; its workers start at once.

    Args:
        states: ``state_dict()`` of every rank's loader at that position, in the order of ranks. Only ``data.reader: dali``
            has any; ``data.reader: index`` needs none, and ``webdataset`` does not go on where it was.

    Raises:
        ConfigError: no ``data.train``; labels that do not fit the head; a batch that does not divide.
        UserError: nothing there, or a shard that does not fit its index.
    """
    train = config.train
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    if train.global_batch % (world * train.micro_batch):
        raise ConfigError(
            f"train.micro_batch={train.micro_batch} on {world} ranks does not divide "
            f"train.global_batch={train.global_batch}"
        )
    if config.data.reader != "index":
        from dattrain.data.stream import open_stream

        return open_stream(
            config, rank=rank, world=world, samples_seen=samples_seen, device=device, size=size, states=states
        )
    dataset, classes = open_split(config, "train", None, rank=rank, world=world)
    order = Order(
        dataset.counts,
        seed=train.seed,
        lanes=config.data.lanes,
        window=config.data.window,
        shuffle=config.data.shuffle,
    )
    if order.samples < train.global_batch:
        raise ConfigError(
            f"data.train={config.data.train} has {order.samples} samples, fewer than one "
            f"train.global_batch={train.global_batch}; use more data or a smaller global batch"
        )
    feed = TrainFeed(
        order,
        config.augment,
        train.seed,
        size,
        train.global_batch,
        train.micro_batch,
        rank,
        world,
        samples_seen,
    )
    decoder = _decoder(config, dataset, feed, size=size, device=device)
    return TrainLoader(dataset, classes, decoder, feed=feed, device=device)


def eval_loader(
    config: Config,
    classes: Classes,
    *,
    rank: int,
    world: int,
    device: torch.device,
    img_size: int | tuple[int, int],
) -> EvalLoader:
    """The evaluation loader of one rank over ``data.val``; its workers start when it is iterated.

    Args:
        classes: of the network: ``TrainLoader.classes``, or those of a run or weights file. Labels of the set that have
            names are asked for by name.

    Raises:
        ConfigError: no ``data.val``, or labels that do not fit the head.
        UserError: nothing there, a class that the network has not, or a shard that does not fit its index.
    """
    dataset, _ = open_split(config, "val", classes, rank=rank, world=world)
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    return EvalLoader(config, dataset, EvalFeed(dataset.counts, config.eval.batch, rank, world), size, device)


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
        if split == "train" and isinstance(dataset, ShardDataset):
            check_train_glob(spec, dataset.shards.paths)
        classes, notes = number(config, split, dataset, classes)
    except BaseException:
        dataset.close()
        raise
    if rank == 0:
        for line in [*dataset.notes, *notes]:
            log.warning("%s", line)
    return dataset, classes


def number(
    config: Config, split: str, dataset: Dataset, classes: Classes | None
) -> tuple[Classes, list[str]]:
    """Give a set the class numbers of the network; returns the network's classes, and what to tell of them.

    Args:
        classes: of the network; None lets this set or ``data.labels`` decide them.

    Raises:
        ConfigError: classes or labels that do not fit the head.
        UserError: a class that the network has not.
    """
    data, num_classes = config.data, config.model.num_classes
    what = f"data.{split}={dataset.name}"
    notes = []
    decides = classes is None
    if classes is None:
        classes = decide(dataset.classes, num_classes, data.labels, what)
    if dataset.classes is not None:
        own = Classes(len(dataset.classes), tuple(dataset.classes), "the manifest beside it")
        hold(own, said_by_samples(dataset), what)
        used = range(len(dataset.classes)) if dataset.used is None else sorted(dataset.used)
        table = np.full(len(dataset.classes), NO_LABEL, dtype=np.int64)
        table[list(used)] = numbers = classes.numbers([dataset.classes[label] for label in used], what)
        dataset.renumber(table)
        if missing := absent(classes, numbers):
            notes.append(
                f"{what}: has images of {len(numbers)} of {classes.count} classes; none of {few(missing)}"
            )
    else:
        said = said_by_samples(dataset)
        notes += bare_numbers(classes, said, what)
        if decides and not classes.names:
            classes = replace(classes, said=frozenset((label, canonical(name)) for _, label, name in said))
    if dataset.max_label >= num_classes:
        raise ConfigError(
            f"{what} has labels up to {dataset.max_label}, but model.num_classes={num_classes}; "
            "the data set and the head do not fit"
        )
    return classes, notes


def _decoder(
    config: Config,
    dataset: Dataset,
    feed: TrainFeed | EvalFeed,
    *,
    size: tuple[int, int],
    device: torch.device,
    transform: EvalTransform | None = None,
    count: int | None = None,
) -> Decoder:
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
    # A worker holds ``prefetch`` batches ready; one is in the trainer's hands and one on its way.
    ring = Ring(max(1, data.workers), data.prefetch + 2, feed.most * size[0] * size[1] * 3)
    return Workers(
        CpuDecoder(read, size=size, skip_bad=skip_bad, transform=transform, ring=ring),
        count=count,
        workers=data.workers,
        prefetch=data.prefetch,
        pin=device.type == "cuda",
        patience=patience(config),
        unit="micro-batch",
    )


def patience(config: Config) -> float:
    """Seconds that a worker may give nothing: fewer than the watchdog's, which could not say which worker it is."""
    return 0.75 * config.train.health.stall_seconds


class ToDevice:
    """Moves batches to the device; on CUDA by a stream of its own, so that copies run beside the computation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        if self._stream is None:
            return batch.to(self.device)
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            moved = batch.to(self.device)
        current.wait_stream(self._stream)
        for tensor in (moved.images, moved.labels, moved.weight):
            # The allocator must not hand the memory out again before the consumer's stream is done with it.
            tensor.record_stream(current)
        return moved
