"""``data.reader: webdataset``: samples of a stream that cannot be indexed, in an order that the library draws.

Decoding and the augmentation plan are as ever. The order is not exact: shards are drawn with replacement, as the library's
author advises for many ranks, so samples are missed and doubled, and a resumed run draws anew.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from dattrain.config.schema import Config
from dattrain.data.augment.plan import draw
from dattrain.data.classes import Classes, decide
from dattrain.data.decode.images import IMAGE_EXTENSIONS
from dattrain.data.feed import BatchRequest, Encoded, RankShare, bad_sample_message
from dattrain.data.label_values import LABEL_FIELDS, as_label, label_of, parse_json
from dattrain.data.source.files import read_file
from dattrain.data.source.manifest import class_names
from dattrain.data.source.shards import brace_expand
from dattrain.data.worker_progress import note
from dattrain.errors import ConfigError, UserError
from dattrain.urls import mask, plain

_SHUFFLE_BUFFER = 1000


def stream_classes(config: Config) -> Classes:
    """The classes of a stream, whose labels are taken as they stand: refused where names say that they must not be."""
    data, what = config.data, f"data.train={config.data.train}"
    assert data.train is not None
    paths = _urls(data.train)
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


def _urls(spec: str) -> list[str]:
    return [url for part in spec.split("::") for url in brace_expand(part)]


class WebStream:
    """Encoded micro-batches from the webdataset library: ``read`` gives the next ones, whatever the number.

    Each worker process of each rank draws its own shards; the draws depend on the seed and on where the run is.
    """

    def __init__(self, config: Config, share: RankShare, size: tuple[int, int]) -> None:
        assert config.data.train is not None
        self.config = config
        self.share = share
        self.size = size
        self.urls = _urls(config.data.train)
        self._samples: Iterator[dict[str, Any]] | None = None

    def read(self, number: int) -> Encoded:
        """The next samples of this process, at the positions of micro-batch ``number``.

        Raises:
            UserError: a shard that cannot be read; a sample that is bad, without ``on_bad: skip``; a label that does
                not fit.
        """
        if self._samples is None:
            self._samples = self._stream()
        n = self.share.micro_batch
        # Consecutive ones: the order of samples is not ours.
        positions = np.arange(n, dtype=np.int64) + sum(self.share.place(number))
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
            found = self._image_and_label(sample)
            if not isinstance(found, str):
                content[i], labels[i] = found
            else:
                bad[i] = mask(f"{sample['__url__']}: sample {sample['__key__']!r} {found}")
                if not skip_bad:
                    raise UserError(bad_sample_message(bad[i]))
        train = self.config.train
        plan = draw(self.config.augment, train.seed, positions, self.size)
        nowhere = np.full(n, -1, dtype=np.int64)
        return Encoded(
            BatchRequest(positions, nowhere, nowhere, plan), content, labels, keys, list(keys), bad
        )

    def _image_and_label(self, sample: Mapping[str, Any]) -> tuple[bytes, int] | str:
        """Both of them, or what is wrong with the sample."""
        image = next((v for k, v in sample.items() if k.lower() in IMAGE_EXTENSIONS), None)
        label = _label(sample)
        if not image:
            return "has no image" if image is None else "has an image of zero bytes"
        if label is None:
            return "has no label (no .cls member, nor a label in .json)"
        if not 0 <= label < self.config.model.num_classes:
            raise UserError(
                f"{sample['__url__']}: sample {sample['__key__']!r}: label {label}, but "
                f"model.num_classes={self.config.model.num_classes}; the data set and the head do not fit"
            )
        return image, label

    def _stream(self) -> Iterator[dict[str, Any]]:
        import webdataset

        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        draws = random.Random(
            f"{self.config.train.seed} {self.share.samples_seen} {self.share.rank} {worker}"
        )
        place, places = self.share.rank * workers + worker, self.share.world * workers
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
