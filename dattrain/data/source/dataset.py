"""Data sets of samples by number: tar shards with an index here, image folders in ``folders``; one function opens both.

A data set delivers encoded bytes. Decoding, order and augmentation are elsewhere, so both decoders share this.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np

from dattrain.data.annotations.coco import CocoDataset
from dattrain.data.annotations.map_folder import MapFolder, map_folder
from dattrain.data.annotations.orientation import upright
from dattrain.data.annotations.semantic import annotated_size
from dattrain.data.annotations.voc import split_of
from dattrain.data.annotations.voc_objects import open_voc
from dattrain.data.source.files import read_file
from dattrain.data.source.folders import FolderDataset
from dattrain.data.source.index import NO_LABEL, ShardIndex
from dattrain.data.source.manifest import Named, class_names
from dattrain.data.source.sample import BadSample, BaseDataset, Dataset, Sample
from dattrain.data.source.shards import (
    LocalSource,
    Shards,
    Source,
    expand,
    holds_shards,
    local_size,
    open_local,
    verify_sizes,
)
from dattrain.data.source.split_file import SUFFIX, SplitDataset
from dattrain.data.source.tar import BLOCK, member_name, member_size
from dattrain.data.worker_progress import note
from dattrain.errors import UserError
from dattrain.urls import mask, parts, split_query

_INDEXES_KEPT = 512
_NEAR = 64 * 1024
"""Bytes between an image and its annotation that are read along, rather than that there are two reads."""


class ShardDataset(BaseDataset):
    """Tar shards. Indexes are read when first needed, and some of them are kept."""

    def __init__(self, name: str, shards: Shards, source: Source, *, named: Named | None = None) -> None:
        self.name = name
        if named is not None:
            self.classes, self.used, self.maskless = list(named.classes), named.used, named.maskless
            self.category_ids = named.category_ids
        self.shards = shards
        self.counts = shards.samples
        self.annotations = shards.annotations
        self.max_label = int(shards.max_labels.max(initial=NO_LABEL))
        self.source = source
        self.prefetches = not isinstance(source, LocalSource)
        self._index = lru_cache(_INDEXES_KEPT)(partial(_read_index, shards, source))

    def key(self, shard: int, sample: int) -> str:
        """See ``Dataset.key``."""
        return f"{os.path.basename(self.shards.paths[shard])}:{self.index(shard).key(sample)}"

    def label(self, shard: int, sample: int) -> int:
        """See ``Dataset.label``."""
        return self._number(int(self.index(shard).labels[sample]), self.shards.paths[shard])

    def image_size(self, shard: int, sample: int) -> tuple[int, int]:
        """See ``Dataset.image_size``; of samples with annotations, from the index."""
        found = self.index(shard).annotated
        return (0, 0) if found is None else (int(found.heights[sample]), int(found.widths[sample]))

    def read(self, shard: int, sample: int) -> Sample:
        """See ``Dataset.read``.

        The tar header before the image is read along with it and compared with the index: a shard that was written
        anew with the same size is noticed. An annotation beside it comes by the same read; an image that its EXIF orientation turns
        to the annotation's size comes turned.
        """
        note(f"{self.shards.paths[shard]}: sample {sample}")
        index = self.index(shard)
        offset, length = int(index.offsets[sample]), int(index.lengths[sample])
        key = index.key(sample)
        path = self.shards.paths[shard]
        name = f"{os.path.basename(path)}:{key}"
        if offset == 0:
            why = f" ({index.why[key]})" if key in index.why else ""
            raise BadSample(f"{path}: sample {key!r} has no image member{why}")
        where = f"{path}: sample {key!r} at offset {offset}"
        if length == 0:
            raise BadSample(f"{where}: the image has zero bytes")
        start, end, place = offset - BLOCK, offset + length, (0, 0)
        if index.annotated is not None:
            place = int(index.annotated.offsets[sample]), int(index.annotated.lengths[sample])
            if not all(place):
                why = f" ({index.why[key]})" if key in index.why else ""
                raise BadSample(f"{where}: has no annotation{why}")
            if abs(place[0] - offset) <= length + place[1] + _NEAR:
                start, end = min(start, place[0] - BLOCK), max(end, sum(place))
        data = self.source.read(shard, start, end - start)

        def member(at: int, size: int, of: str | None) -> bytes:
            """A member's bytes, after a look at its header."""
            near = start <= at - BLOCK and at + size <= end
            found = (
                data[at - BLOCK - start : at + size - start]
                if near
                else self.source.read(shard, at - BLOCK, size + BLOCK)
            )
            if not _header_fits(found[:BLOCK], of, size):
                raise UserError(
                    f"{where}: the tar header there is not this sample's, so the shard is not the one that was indexed; "
                    "restore it, or index it anew with `dattrain data index --force`"
                )
            return found[BLOCK:]

        image = member(offset, length, None if index.linked[sample] else key)
        if index.annotated is None:
            return Sample(name, where, self._number(int(index.labels[sample]), where), image)
        annotation = member(*place, None)
        return Sample(name, where, NO_LABEL, upright(image, annotated_size(annotation), where), annotation)

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard, checked against the catalogue."""
        return self._index(shard)

    def prefetch(self, shards: Sequence[int]) -> None:
        """See ``Source.prefetch``."""
        self.source.prefetch(shards)

    def close(self) -> None:
        """See ``Source.close``."""
        self.source.close()


def _read_index(shards: Shards, source: Source, shard: int) -> ShardIndex:
    note(f"{shards.paths[shard]}: its index")
    index = source.index(shard)
    if len(index) != shards.samples[shard] or index.size != shards.sizes[shard]:
        raise UserError(
            f"{shards.paths[shard]}: its index has {len(index)} samples of {index.size} bytes, the catalogue says "
            f"{shards.samples[shard]} of {shards.sizes[shard]}; run `dattrain data index --force`"
        )
    return index


def open_dataset(
    spec: str,
    *,
    cache_dir: str | None = None,
    cache_gb: float = 100.0,
    verify: bool = False,
    rank: int = 0,
    world: int = 1,
    problems: list[str] | None = None,
) -> Dataset:
    """Open what ``data.train`` or ``data.val`` names: shards (local or remote) or an image folder.

    Sets with annotations are read as they are given out: a folder of images beside which one of maps lies (ADE20K's
    ``images/training`` and ``annotations/training``), a COCO JSON, a list in VOC's ``ImageSets/Segmentation`` or ``ImageSets/Main``.
    With ``verify``, the sizes of this rank's part of the shards are compared with their indexes. ``problems`` takes
    messages about local shards that cannot be used, and which are then left out, instead of an error.

    Raises:
        UserError: nothing is there, an index is missing, or a shard's size differs from its index.
    """
    from dattrain.data.source.listing import is_remote

    if is_remote(spec):
        from dattrain.data.source.remote import open_remote

        shards, source = open_remote(
            spec, cache_dir=cache_dir, cache_gb=cache_gb, verify=verify, rank=rank, world=world
        )

        def read(path: str) -> bytes:
            return source.transfer.read(path) if "://" in path else read_file(path)

        lists = [part for part in parts(spec) if split_query(part)[0].endswith(".txt")]
        named = class_names(source.urls, read, lists)
        dataset: Dataset = ShardDataset(mask(spec), shards, source, named=named)
    elif split_of(spec):
        dataset = open_voc(spec)
    elif spec.endswith(".json") and not spec.endswith(SUFFIX):
        dataset = CocoDataset(spec)
    elif os.path.isdir(spec) and not holds_shards(spec):
        beside = map_folder(spec)
        dataset = FolderDataset(spec) if beside is None else MapFolder(spec, beside)
    elif spec.endswith(SUFFIX):
        dataset = SplitDataset(spec)
    else:
        shards = open_local(expand(spec), problems=problems)
        if verify:
            verify_sizes(shards, lambda shard: local_size(shards.paths[shard]), rank=rank, world=world)
        named = class_names(shards.paths, read_file)
        dataset = ShardDataset(spec, shards, LocalSource(shards), named=named)
    if not dataset.counts.sum() and not problems:
        raise UserError(f"{spec}: has no samples")
    return dataset


def locate(dataset: Dataset, item: int) -> tuple[int, int]:
    """Shard and sample of a number that counts through the whole set."""
    shard = int(np.searchsorted(np.cumsum(dataset.counts), item, side="right"))
    return shard, item - int(dataset.counts[:shard].sum())


def _header_fits(header: bytes, key: str | None, length: int) -> bool:
    """Whether a tar header is that of a member of ``length`` bytes called ``key``, ``key.*``, or anything for None."""
    try:
        if member_size(header) != length:
            return False
    except ValueError:
        return False
    if key is None:
        return True
    # Long and non-ASCII names stand in an extension header before this one, which holds a shortened form.
    return len(key) > 90 or not key.isascii() or f"{member_name(header)}.".startswith(f"{key}.")


__all__ = [
    "NO_LABEL", "BadSample", "Dataset", "FolderDataset", "Sample", "ShardDataset",
    "locate", "open_dataset",
]  # fmt: skip
