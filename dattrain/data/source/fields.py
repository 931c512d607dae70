"""What else a sample's ``.json`` member holds: kept when shards are packed anew, and a source of other labels.

An index does not say where it is; it lies between the images before and after, so few headers are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from dattrain.data.label_values import label_of, parse_json
from dattrain.data.source import tar
from dattrain.data.source.class_tars import ClassTars
from dattrain.data.source.dataset import ShardDataset
from dattrain.data.source.index import NO_LABEL, ShardIndex
from dattrain.data.source.sample import BadSample, BaseDataset, Dataset, Sample
from dattrain.data.source.shards import LocalSource
from dattrain.errors import UserError


def fields(dataset: Dataset, shard: int, sample: int) -> dict[str, Any]:
    """The fields of a sample's ``.json``; empty where it has none. What is no object is the value of ``json``.

    Raises:
        BadSample: it does not parse.
        UserError: the shard is damaged.
    """
    if isinstance(dataset, Relabelled):
        return fields(dataset.source, shard, sample)
    if isinstance(dataset, ClassTars) or not isinstance(dataset, ShardDataset):
        return {}
    return _fields(
        dataset, shard, sample, dataset.index(shard), lambda *where: dataset.source.read(shard, *where)
    )


def _fields(
    dataset: ShardDataset,
    shard: int,
    sample: int,
    index: ShardIndex,
    read: Callable[[int, int], bytes],
) -> dict[str, Any]:
    path = dataset.shards.paths[shard]
    # Hard links stand elsewhere than the bytes that they name.
    own = np.flatnonzero((index.offsets > 0) & ~index.linked)
    before, after = own[own < sample], own[own > sample]
    start, end = 0, int(dataset.shards.sizes[shard])
    if len(before):
        last = int(before[-1])
        start = int(index.offsets[last]) + -(-int(index.lengths[last]) // tar.BLOCK) * tar.BLOCK
    if len(after):
        end = int(index.offsets[after[0]]) - tar.BLOCK
    key = index.key(sample)
    if start >= end:
        return {}
    for member in tar.walk(path, read, start=start, end=end, unterminated=True):
        its, extension = tar.split_name(member.name)
        if its == key and extension.lower() == "json" and member.readable:
            try:
                where = f"{path}: sample {key!r} at offset {member.offset}"
                content = parse_json(read(member.offset, member.size), where)
            except UserError as error:
                raise BadSample(str(error)) from error
            return content if isinstance(content, dict) else {"json": content}
    return {}


def sampled_class_names(dataset: Dataset) -> list[tuple[str, int, str]]:
    """(key, label, class) of some samples of shards whose ``.json`` names their class, as ``data pack`` writes it.

    Four samples of four shards are looked at, and two of two of remote ones: opening a set stays a matter of its catalogue.
    """
    if isinstance(dataset, ClassTars) or not isinstance(dataset, ShardDataset):
        return []
    some = 4 if isinstance(dataset.source, LocalSource) else 2
    found = []
    full = np.flatnonzero(dataset.counts)
    for shard in full[np.unique(np.linspace(0, len(full) - 1, some).astype(int))].tolist():
        with suppress(BadSample, UserError):  # whoever reads the shard meets it again, where the run needs it
            peeked = dataset.source.peek(shard)
            if peeked is None:
                continue
            for sample in np.unique(np.linspace(0, dataset.counts[shard] - 1, some).astype(int)).tolist():
                name = _fields(dataset, shard, sample, *peeked).get("class")
                label = dataset.label(shard, sample)
                if isinstance(name, str) and label != NO_LABEL:
                    found.append((dataset.key(shard, sample), label, name))
    return found


class Relabelled(BaseDataset):
    """Shards whose labels stand in another field of ``.json``. A sample without it has no label."""

    def __init__(self, source: Dataset, field: str) -> None:
        if not isinstance(source, ShardDataset):
            raise UserError(
                f"--label {field}: {source.name} holds no shards, whose .json would have the field"
            )
        self.source, self.field = source, field
        self.name, self.counts, self.prefetches = source.name, source.counts, source.prefetches

    def key(self, shard: int, sample: int) -> str:
        """See ``Dataset.key``."""
        return self.source.key(shard, sample)

    def label(self, shard: int, sample: int) -> int:
        """See ``Dataset.label``; reads the sample's ``.json``."""
        try:
            return self._label(shard, sample)[0]
        except BadSample:
            return NO_LABEL

    def read(self, shard: int, sample: int) -> Sample:
        """See ``Dataset.read``."""
        found = self.source.read(shard, sample)
        label, seen = self._label(shard, sample)
        if label == NO_LABEL:
            raise BadSample(
                f"{found.where}: its .json has no integer field {self.field!r}"
                + (f", but {seen}" if seen else "")
            )
        return Sample(found.key, found.where, label, found.data)

    def prefetch(self, shards: Sequence[int]) -> None:
        """See ``Dataset.prefetch``."""
        self.source.prefetch(shards)

    def close(self) -> None:
        """See ``Dataset.close``."""
        self.source.close()

    def _label(self, shard: int, sample: int) -> tuple[int, str | None]:
        where = self.key(shard, sample)
        try:
            label, seen = label_of(fields(self.source, shard, sample), (self.field,), where)
        except UserError as error:
            raise BadSample(str(error)) from error
        return (NO_LABEL if label is None else label), seen
