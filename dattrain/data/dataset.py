"""Samples by number: tar shards with an index, or a folder of images per class, behind one protocol.

A data set delivers encoded bytes. Decoding, order and augmentation are elsewhere, so both decoders share this.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dattrain.data.board import note
from dattrain.data.images import IMAGE_EXTENSIONS as IMAGE_EXTENSIONS
from dattrain.data.images import is_image_name
from dattrain.data.index import NO_LABEL, ShardIndex
from dattrain.data.shards import LocalSource, Shards, Source, expand, open_local, verify_sizes
from dattrain.errors import UserError

_BLOCK = 512


class BadSample(Exception):
    """One sample that cannot be used. The message names shard, key and offset, and says why."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Where a sample is, and what it holds.

    ``key`` is ``shard:key``; ``where`` adds the offset; ``label`` may be ``NO_LABEL``; ``data`` is the encoded image.
    """

    key: str
    where: str
    label: int
    data: bytes


class Dataset(Protocol):
    """Samples addressed by (shard, sample)."""

    name: str
    counts: NDArray[np.int64]
    """Samples per shard."""
    max_label: int
    """Largest label, or ``NO_LABEL`` where it is not known without reading every index."""
    fetches: bool
    """Whether ``ahead`` does anything."""

    def key(self, shard: int, sample: int) -> str:
        """``shard:key`` of a sample."""
        ...

    def label(self, shard: int, sample: int) -> int:
        """Label of a sample, or ``NO_LABEL``."""
        ...

    def read(self, shard: int, sample: int) -> Sample:
        """The encoded image. Raises BadSample for a sample without image, UserError for a damaged shard."""
        ...

    def ahead(self, shards: Sequence[int]) -> None:
        """Hint: shards read next."""
        ...

    def close(self) -> None:
        """Release files."""
        ...


class ShardDataset:
    """Tar shards. Indexes are read when first needed, and ``max_indexes`` of them are kept."""

    def __init__(self, name: str, shards: Shards, source: Source, *, max_indexes: int = 512) -> None:
        self.name = name
        self.shards = shards
        self.counts = shards.samples
        self.max_label = int(shards.max_labels.max(initial=NO_LABEL))
        self.source = source
        self.fetches = not isinstance(source, LocalSource)
        self.max_indexes = max_indexes
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()

    def key(self, shard: int, sample: int) -> str:
        """See ``Dataset.key``."""
        return f"{os.path.basename(self.shards.paths[shard])}:{self.index(shard).key(sample)}"

    def label(self, shard: int, sample: int) -> int:
        """See ``Dataset.label``."""
        return int(self.index(shard).labels[sample])

    def read(self, shard: int, sample: int) -> Sample:
        """See ``Dataset.read``.

        The tar header before the image is read along with it and compared with the index: a shard that was written
        anew with the same size is noticed.
        """
        note(f"{self.shards.paths[shard]}: sample {sample}")
        index = self.index(shard)
        offset, length = int(index.offsets[sample]), int(index.lengths[sample])
        key = index.key(sample)
        path = self.shards.paths[shard]
        name = f"{os.path.basename(path)}:{key}"
        if offset == 0:
            raise BadSample(f"{path}: sample {key!r} has no image member")
        where = f"{path}: sample {key!r} at offset {offset}"
        if length == 0:
            raise BadSample(f"{where}: the image has zero bytes")
        data = self.source.read(shard, offset - _BLOCK, length + _BLOCK)
        if not header_fits(data[:_BLOCK], key, length):
            raise UserError(
                f"{where}: the tar header there is not this sample's, so the shard is not the one that was indexed; "
                "restore it, or index it anew with `dattrain data index --force`"
            )
        return Sample(name, where, int(index.labels[sample]), data[_BLOCK:])

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard, checked against the catalogue."""
        index = self._indexes.get(shard)
        if index is None:
            note(f"{self.shards.paths[shard]}: its index")
            index = self.source.index(shard)
            if len(index) != self.counts[shard] or index.size != self.shards.sizes[shard]:
                raise UserError(
                    f"{self.shards.paths[shard]}: its index has {len(index)} samples of {index.size} bytes, the "
                    f"catalogue says {self.counts[shard]} of {self.shards.sizes[shard]}; "
                    "run `dattrain data index --force`"
                )
            self._indexes[shard] = index
            if len(self._indexes) > self.max_indexes:
                self._indexes.popitem(last=False)
        else:
            # Threads share the table (DALI's readers), so another may just have let go of this index.
            with suppress(KeyError):
                self._indexes.move_to_end(shard)
        return index

    def ahead(self, shards: Sequence[int]) -> None:
        """See ``Source.ahead``."""
        self.source.ahead(shards)

    def close(self) -> None:
        """See ``Source.close``."""
        self.source.close()


class FolderDataset:
    """``root/<class>/**/<image>``: one file per image; labels number the sorted class folders.

    The files are one shard in a fixed scrambled order (by a hash of the name), since the order's windows would
    otherwise keep classes together; random access costs a folder nothing.
    """

    def __init__(self, root: str) -> None:
        self.name = root
        self.root = Path(root)
        classes = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
        files: list[tuple[str, int]] = []
        for label, folder in enumerate(classes):
            found = len(files)
            for parent, _, names in os.walk(self.root / folder, followlinks=True):
                relative = os.path.relpath(parent, root)
                files += [(os.path.join(relative, n), label) for n in names if is_image_name(n)]
            if len(files) == found:
                raise UserError(f"{self.root / folder}: a class folder without images")
        if not files:
            raise UserError(f"{root}: has neither tar shards nor class folders with images")
        self.classes = classes
        files.sort(key=lambda file: (scramble(file[0]), file[0]))
        self._names = [name for name, _ in files]
        self._labels = np.asarray([label for _, label in files], dtype=np.int64)
        self.counts = np.asarray([len(files)], dtype=np.int64)
        self.max_label = len(classes) - 1
        self.fetches = False

    def key(self, shard: int, sample: int) -> str:
        """See ``Dataset.key``; the path below the root."""
        return f"{self.root.name}:{self._names[sample]}"

    def label(self, shard: int, sample: int) -> int:
        """See ``Dataset.label``."""
        return int(self._labels[sample])

    def read(self, shard: int, sample: int) -> Sample:
        """See ``Dataset.read``."""
        path = self.root / self._names[sample]
        note(str(path))
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise UserError(f"{path}: is gone since the folder was listed") from error
        except OSError as error:
            raise BadSample(f"{path}: cannot be read ({error.strerror})") from error
        if not data:
            raise BadSample(f"{path}: the image has zero bytes")
        return Sample(self.key(shard, sample), str(path), self.label(shard, sample), data)

    def ahead(self, shards: Sequence[int]) -> None:
        """Nothing to fetch."""

    def close(self) -> None:
        """Nothing to close."""


def open_dataset(
    spec: str,
    *,
    cache_dir: str | None = None,
    cache_gb: float = 100.0,
    verify: bool = False,
    rank: int = 0,
    world: int = 1,
) -> Dataset:
    """Open what ``data.train`` or ``data.val`` names: shards (local or remote) or an image folder.

    With ``verify``, the sizes of this rank's part of the shards are compared with their indexes.

    Raises:
        UserError: nothing is there, an index is missing, or a shard's size differs from its index.
    """
    if "://" in spec:
        from dattrain.data.remote import open_remote

        shards, source = open_remote(
            spec, cache_dir=cache_dir, cache_gb=cache_gb, verify=verify, rank=rank, world=world
        )
        dataset: Dataset = ShardDataset(spec, shards, source)
    elif os.path.isdir(spec) and not any(e.name.endswith(".tar") for e in os.scandir(spec)):
        dataset = FolderDataset(spec)
    else:
        shards = open_local(expand(spec))
        if verify:
            verify_sizes(shards, rank=rank, world=world)
        dataset = ShardDataset(spec, shards, LocalSource(shards))
    if not dataset.counts.sum():
        raise UserError(f"{spec}: has no samples")
    return dataset


def locate(dataset: Dataset, item: int) -> tuple[int, int]:
    """Shard and sample of a number that counts through the whole set."""
    shard = int(np.searchsorted(np.cumsum(dataset.counts), item, side="right"))
    return shard, item - int(dataset.counts[:shard].sum())


def scramble(name: str) -> bytes:
    """A fixed pseudo-random key of a name, the same on every machine."""
    from hashlib import blake2b

    return blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()


def header_fits(header: bytes, key: str, length: int) -> bool:
    """Whether a tar header is that of a member of ``length`` bytes called ``key.*``."""
    from dattrain.data.tar import member_name, member_size

    try:
        if member_size(header) != length:
            return False
    except ValueError:
        return False
    # Long and non-ASCII names stand in an extension header before this one, which holds a shortened form.
    return len(key) > 90 or not key.isascii() or member_name(header).startswith(key + ".")
