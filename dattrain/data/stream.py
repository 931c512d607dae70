"""Readers that keep an order of their own: ``data.reader: dali`` and ``data.reader: webdataset``.

Decoding and the augmentation plan are as ever; which sample comes when is the library's affair. Neither gives one order
at every world size. DALI's reader sees every sample once per epoch and goes on exactly where a checkpoint was made,
on the same number of ranks only. The webdataset library draws shards with replacement, as its author advises for many
ranks: samples are missed and doubled, and a resumed run draws anew.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dattrain.config.schema import Config
from dattrain.data import identity
from dattrain.data.augment.plan import draw
from dattrain.data.batch import Batch
from dattrain.data.board import note
from dattrain.data.classes import Classes, decide
from dattrain.data.decode.cpu import CpuDecoder
from dattrain.data.decode.images import IMAGE_EXTENSIONS
from dattrain.data.feed import Encoded, Request, bad_sample_message
from dattrain.data.label_values import LABEL_FIELDS, as_label, label_of, parse_json
from dattrain.data.loader import Bad, Decoder, ToDevice, open_split, patience
from dattrain.data.source.files import read_file
from dattrain.data.source.manifest import class_names
from dattrain.data.source.shards import brace_expand
from dattrain.data.workers import Workers
from dattrain.errors import ConfigError, UserError
from dattrain.urls import mask, plain

log = logging.getLogger(__name__)

_SHUFFLE_BUFFER = 1000


@dataclass(frozen=True)
class Slots:
    """Global positions of a rank's micro-batches: consecutive ones, since the order is not ours."""

    global_batch: int
    micro_batch: int
    rank: int
    world: int
    samples_seen: int

    def positions(self, number: int) -> NDArray[np.int64]:
        """Of micro-batch ``number`` since ``samples_seen``."""
        share = self.global_batch // self.world
        update, part = divmod(number, share // self.micro_batch)
        start = self.samples_seen + update * self.global_batch + self.rank * share + part * self.micro_batch
        return np.arange(start, start + self.micro_batch, dtype=np.int64)


class StreamLoader:
    """Micro-batches of one rank, for ever; the protocol of ``loader.TrainLoader``.

    Attributes:
        exact: False.
        samples_per_epoch: with the padding that ends a rank's epoch in ``data.reader: dali``.
        num_classes_seen: one more than the largest label, None where that is unknown.
        classes: what the network's outputs stand for.
        identity: of the set (``dattrain.data.identity``).
        bad: skipped samples.
    """

    exact = False

    def __init__(
        self,
        decoder: Decoder,
        classes: Classes,
        *,
        samples_per_epoch: int,
        num_classes_seen: int | None,
        identity: Sequence[identity.Part],
        device: torch.device,
        after: Callable[[int, Batch], tuple[Batch, dict[str, Any]]] = lambda number, batch: (batch, {}),
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.samples_per_epoch = samples_per_epoch
        self.num_classes_seen = num_classes_seen
        self.identity = identity
        self.classes = classes
        self.bad = Bad()
        self._decoder = decoder
        self._after = after
        self._close = close
        self._to_device = ToDevice(device)
        self._waited = 0.0
        self._served = 0
        self._state: dict[str, Any] = {}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        batch = next(self._decoder)
        self._waited += time.perf_counter() - start
        batch, self._state = self._after(self._served, batch)
        self._served += 1
        self.bad.add(batch.bad)
        return self._to_device(batch)

    def state_dict(self) -> dict[str, Any]:
        """What this rank's reader needs to go on after the batch served last: small, and fit for JSON."""
        return self._state

    @property
    def wait_s(self) -> float:
        """Seconds spent waiting for data since this was last read."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """End the workers and release files."""
        self._decoder.close()
        self._close()


def open_stream(
    config: Config,
    *,
    rank: int,
    world: int,
    samples_seen: int,
    device: torch.device,
    size: tuple[int, int],
    states: Sequence[Mapping[str, Any]] | None = None,
) -> StreamLoader:
    """The training loader of ``data.reader: dali`` or ``webdataset``; see ``loader.train_loader``.

    Raises:
        ConfigError: settings that this reader cannot do.
        UserError: nothing there; a state that is missing or another set's, world's or version's.
    """
    train = config.train
    slots = Slots(train.global_batch, train.micro_batch, rank, world, samples_seen)
    if config.data.reader == "webdataset":
        return _open_webdataset(config, slots, device, size)
    from dattrain.data.dali_reader import DaliReader
    from dattrain.data.decode.dali import DaliDecoder

    dataset, classes = open_split(config, "train", None, rank=rank, world=world)
    reader = DaliReader(config, dataset, slots, size, states)
    log.info(
        "data.reader=dali: DALI keeps the order; a checkpoint can only be resumed on %d ranks with the same shards, "
        "train.micro_batch and DALI version",
        world,
    )

    def close() -> None:
        reader.close()
        dataset.close()

    decoder = DaliDecoder(
        reader.read,
        batch=train.micro_batch,
        size=size,
        skip_bad=config.data.on_bad == "skip",
        interpolation=config.augment.interpolation,
        data=config.data,
        device=device,
    )
    return StreamLoader(
        decoder,
        classes,
        samples_per_epoch=reader.samples_per_epoch,
        num_classes_seen=dataset.max_label + 1 or None,
        identity=identity.of_dataset(dataset),
        device=device,
        after=reader.after,
        close=close,
    )


def _open_webdataset(
    config: Config, slots: Slots, device: torch.device, size: tuple[int, int]
) -> StreamLoader:
    data = config.data
    if data.train is None:
        raise ConfigError(
            "data.train is not set; name shards or pipes, as in 'pipe:cat set-{0000..0099}.tar'"
        )
    if data.samples is None:
        raise ConfigError(
            "data.reader=webdataset cannot count the samples of a stream; set data.samples to how many make an epoch"
        )
    classes = _stream_classes(config)
    log.warning(
        "data.reader=webdataset is not exact: shards are drawn with replacement, so samples are missed and doubled, and "
        "a resumed run does not see what an uninterrupted one would have seen; data.reader=index is exact"
    )
    stream = WebStream(config, slots, size)
    workers = Workers(
        CpuDecoder(stream.read, size=size, skip_bad=data.on_bad == "skip"),
        count=None,
        workers=data.workers,
        prefetch=data.prefetch,
        pin=device.type == "cuda",
        patience=patience(config),
        unit="micro-batch",
    )
    return StreamLoader(
        workers,
        classes,
        samples_per_epoch=data.samples,
        num_classes_seen=None,
        identity=identity.of_stream(stream.urls, data.samples),
        device=device,
    )


def _stream_classes(config: Config) -> Classes:
    """The classes of a stream, whose labels are taken as they stand: refused where names say that they must not be."""
    data, what = config.data, f"data.train={config.data.train}"
    assert data.train is not None
    paths = [path for part in data.train.split("::") for path in brace_expand(part)]
    local = [path for path in paths if "://" not in path and not path.startswith("pipe:")]
    named = class_names(local, read_file) if len(local) == len(paths) else None
    names = None if named is None else named.classes
    classes = decide(names, config.model.num_classes, data.labels, what)
    if names is not None and classes.numbers(names, what).tolist() != list(range(len(names))):
        raise ConfigError(
            f"{what}: numbers its classes otherwise than {classes.source}, and data.reader=webdataset takes labels as they "
            "stand; use data.reader=index, which asks by name"
        )
    return classes


class WebStream:
    """Encoded micro-batches from the webdataset library: ``read`` gives the next ones, whatever the number.

    Each worker process of each rank draws its own shards; the draws depend on the seed and on where the run is.
    """

    def __init__(self, config: Config, slots: Slots, size: tuple[int, int]) -> None:
        assert config.data.train is not None
        self.config = config
        self.slots = slots
        self.size = size
        self.urls = [url for part in config.data.train.split("::") for url in brace_expand(part)]
        self._samples: Iterator[dict[str, Any]] | None = None

    def read(self, number: int) -> Encoded:
        """The next samples of this process, at the positions of micro-batch ``number``.

        Raises:
            UserError: a shard that cannot be read; a sample that is bad, without ``on_bad: skip``; a label that does
                not fit.
        """
        if self._samples is None:
            self._samples = self._stream()
        positions = self.slots.positions(number)
        n = len(positions)
        skip_bad = self.config.data.on_bad == "skip"
        content: list[bytes | None] = [None] * n
        labels, keys, bad = np.zeros(n, dtype=np.int64), [""] * n, {}
        for i in range(n):
            try:
                sample = next(self._samples)
            except UserError:
                raise
            except Exception as error:
                raise UserError(f"data.train={self.config.data.train}: {error}") from error
            keys[i] = f"{plain(str(sample['__url__'])).rpartition('/')[2]}:{sample['__key__']}"
            found, reason = self._image_and_label(sample)
            if reason is None:
                content[i], labels[i] = found
            else:
                bad[i] = mask(f"{sample['__url__']}: sample {sample['__key__']!r} {reason}")
                if not skip_bad:
                    raise UserError(bad_sample_message(bad[i]))
        train = self.config.train
        plan = draw(self.config.augment, train.seed, positions, self.size)
        nowhere = np.full(n, -1, dtype=np.int64)
        return Encoded(Request(positions, nowhere, nowhere, plan), content, labels, keys, list(keys), bad)

    def _image_and_label(self, sample: Mapping[str, Any]) -> tuple[tuple[bytes, int], str | None]:
        image = next((v for k, v in sample.items() if k.lower() in IMAGE_EXTENSIONS), None)
        label = _label(sample)
        if not image:
            return (b"", 0), "has no image" if image is None else "has an image of zero bytes"
        if label is None:
            return (b"", 0), "has no label (no .cls member, nor a label in .json)"
        if not 0 <= label < self.config.model.num_classes:
            raise UserError(
                f"{sample['__url__']}: sample {sample['__key__']!r}: label {label}, but "
                f"model.num_classes={self.config.model.num_classes}; the data set and the head do not fit"
            )
        return (image, label), None

    def _stream(self) -> Iterator[dict[str, Any]]:
        import webdataset

        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        draws = random.Random(
            f"{self.config.train.seed} {self.slots.samples_seen} {self.slots.rank} {worker}"
        )
        place, places = self.slots.rank * workers + worker, self.slots.world * workers
        shuffle = self.config.data.shuffle

        def shards() -> Iterator[dict[str, str]]:
            turn = place
            while True:
                url = draws.choice(self.urls) if shuffle else self.urls[turn % len(self.urls)]
                note(mask(url))
                yield {"url": url}
                turn += places

        samples = webdataset.tarfile_to_samples()(shards())
        if shuffle:
            samples = webdataset.shuffle(_SHUFFLE_BUFFER, initial=_SHUFFLE_BUFFER // 4, rng=draws)(samples)
        return iter(samples)


def _label(sample: Mapping[str, Any]) -> int | None:
    """From ``.cls``, else from ``.json``, as ``data index`` finds it; None where there is none."""
    where = f"{sample['__url__']}: sample {sample['__key__']!r}"
    if "cls" in sample:
        label = as_label(sample["cls"].decode("utf-8", "replace"), where)
        if label is None:
            raise UserError(f"{where}: its .cls holds {sample['cls'][:40]!r}, not a number")
        return label
    if "json" not in sample:
        return None
    return label_of(parse_json(sample["json"], where), LABEL_FIELDS, where)[0]


def unweighted(batch: Batch, rows: NDArray[np.bool_]) -> Batch:
    """The batch with zero weight on some rows, and those unmixed that have one of them as partner."""
    if not rows.any():
        return batch
    weight = torch.where(torch.from_numpy(rows), 0.0, batch.weight)
    plan = None if batch.plan is None else batch.plan.without_mixing(rows)
    return replace(batch, weight=weight, plan=plan)
