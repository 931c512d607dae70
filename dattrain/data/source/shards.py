"""Sets of tar shards: what a pattern names, how many samples each shard has, and reading a byte range of one.

``Source`` is the protocol of whoever delivers bytes: ``LocalSource`` here, the cache of remote shards in
``dattrain.data.source.remote``.
"""

from __future__ import annotations

import glob
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dattrain.data.decode.images import is_image_name
from dattrain.data.source import inventory, tar
from dattrain.data.source.annotation_index import Annotations
from dattrain.data.source.files import OpenFile, explained, listing, open_file
from dattrain.data.source.folders import OTHER_SPLITS
from dattrain.data.source.index import (
    CatalogueEntry,
    ShardIndex,
    index_path,
    read_catalogue,
    read_index,
    read_record,
)
from dattrain.errors import UserError
from dattrain.urls import mask, plain

WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Shards:
    """An ordered set of shards.

    Attributes:
        paths: path or URL of each.
        samples: per shard, int64.
        sizes: bytes per shard, int64.
        sha256: per shard, "" where unknown.
        max_labels: largest label per shard, int64; ``NO_LABEL`` where there is none or it is unknown.
        annotations: what the samples of all hold beside the image.
    """

    paths: tuple[str, ...]
    samples: NDArray[np.int64]
    sizes: NDArray[np.int64]
    sha256: tuple[str, ...]
    max_labels: NDArray[np.int64]
    annotations: Annotations = "none"

    @classmethod
    def build(cls, paths: Sequence[str], entries: Sequence[CatalogueEntry]) -> Shards:
        """From one catalogue entry per path.

        Raises:
            UserError: they hold annotations of several kinds, or some hold none.
        """
        kinds = {entry.annotations: path for path, entry in zip(paths, entries) if entry.samples}
        if len(kinds) > 1:
            (one, path), (two, other) = list(kinds.items())[:2]
            raise UserError(
                f"{path} holds {'no annotations' if one == 'none' else one} beside its images, and {other} "
                f"{'none' if two == 'none' else two}; a set holds one kind: name them apart, or pack them anew"
            )
        return cls(
            tuple(paths),
            np.asarray([e.samples for e in entries], dtype=np.int64),
            np.asarray([e.size for e in entries], dtype=np.int64),
            tuple(e.sha256 for e in entries),
            np.asarray([e.max_label for e in entries], dtype=np.int64),
            next(iter(kinds), "none"),
        )


class Source(Protocol):
    """Delivers bytes of the shards of a set, by shard number. Calls may come from several threads."""

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``.

        Raises UserError when the shard is gone, shorter, or of another size than its index says.
        """
        ...

    def index(self, shard: int) -> ShardIndex:
        """The shard's index. Raises UserError when there is none."""
        ...

    def peek(self, shard: int) -> tuple[ShardIndex, Callable[[int, int], bytes]] | None:
        """The shard's index, and ``read`` of it for a few bytes; None where these would cost a large shard's transfer.

        Raises UserError, both of them.
        """
        ...

    def prefetch(self, shards: Sequence[int]) -> None:
        """Take the hint that these shards will be read next, in the order of need; called in the rank's main process."""
        ...

    def close(self) -> None:
        """Release files and background work."""
        ...


class LocalSource:
    """Shards on a local or parallel file system, read with pread; at most ``max_open`` are held open."""

    def __init__(self, shards: Shards, *, max_open: int = 256) -> None:
        self.shards = shards
        self.max_open = max_open
        self._open: OrderedDict[int, OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """See ``Source.read``."""
        file = self._file(shard)
        parts, missing = [], length
        while missing:
            try:
                part = os.pread(file.fd, missing, offset + length - missing)
            except OSError as error:
                raise UserError(f"{self.shards.paths[shard]}: cannot be read ({error.strerror})") from error
            if not part:
                raise UserError(
                    f"{self.shards.paths[shard]}: ends before byte {offset + length}, which its index says it has; "
                    "the shard was cut short under the run: restore it, or index it anew with `dattrain data index`"
                )
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def index(self, shard: int) -> ShardIndex:
        """See ``Source.index``."""
        return read_index(self.shards.paths[shard])

    def peek(self, shard: int) -> tuple[ShardIndex, Callable[[int, int], bytes]]:
        """See ``Source.peek``."""
        return self.index(shard), partial(self.read, shard)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Nothing: the file system reads ahead by itself."""

    def close(self) -> None:
        """Let go of the open files."""
        with self._lock:
            self._open.clear()

    def _file(self, shard: int) -> OpenFile:
        with self._lock:
            file = self._open.get(shard)
            if file is None:
                path = self.shards.paths[shard]
                with explained(path, "opened"):
                    file = OpenFile(open_file(path))
                check_size(path, os.fstat(file.fd).st_size, int(self.shards.sizes[shard]))
                self._open[shard] = file
                if len(self._open) > self.max_open:
                    self._open.popitem(last=False)
            self._open.move_to_end(shard)
            return file


def check_size(path: str, found: int, expected: int) -> None:
    """Raise UserError where a shard's size is not that of its index."""
    if found != expected:
        raise UserError(
            f"{path}: has {found} bytes, but its index was built for {expected}; the shard was changed or cut short: "
            "restore it, or index it anew with `dattrain data index --force`"
        )


def local_size(path: str) -> int:
    """Bytes of a file. Raises UserError where there is none."""
    with explained(path, "opened"):
        return os.stat(path).st_size


def expand(pattern: str) -> list[str]:
    """Shard paths that a pattern names: a folder, a .tar, a .txt list, a brace or glob pattern, or several with ``::``.

    A folder and a glob pattern also name the shards that should be there, by the records of the folder.

    Raises:
        UserError: nothing is there, a folder holds the shards of more than one split, or some are compressed.
    """
    if "::" in pattern and "://" not in pattern.replace("::", ""):
        parts = pattern.split("::")
        if not all(parts):
            raise UserError(f"{pattern}: nothing stands on one side of a ::")
        return _once(pattern, [path for part in parts for path in expand(part)])
    if os.path.isdir(pattern):
        return _in_folder(pattern)
    if pattern.endswith(".txt") and os.path.isfile(pattern):
        lines = list_lines(pattern, read_record(Path(pattern)) or b"")
        image = next((line for line in lines if is_image_name(re.split(r"\s*[\t,]|\s+\S+$", line)[0])), None)
        if image is not None:
            raise UserError(
                f"{pattern}: holds {image!r}, an image and no shard; make shards of a list of images with `dattrain data pack {pattern} OUT`"
            )
        if not lines:
            raise UserError(f"{pattern}: names no shards")
        return _once(pattern, [os.path.join(os.path.dirname(pattern), line) for line in lines])
    if os.path.exists(pattern):
        return [pattern]
    paths = brace_expand(pattern)
    if any(map(WILDCARD.search, paths)):
        paths = sorted({found for path in paths for found in _matching(path)})
    elif len(paths) == 1:
        paths = []
    if not paths:
        raise UserError(f"{pattern}: there is no such shard, folder or pattern of shards")
    return paths


def list_lines(name: str, data: bytes) -> list[str]:
    """The entries of a ``.txt`` list of shards: its lines, but for empty ones and comments.

    Raises:
        UserError: it is no UTF-8.
    """
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: cannot be read as a list in UTF-8 ({error})") from error
    return [line for line in lines if line and not line.startswith("#")]


def _once(pattern: str, paths: list[str]) -> list[str]:
    """The paths. Raises UserError where one comes twice: its samples would be seen twice an epoch."""
    seen: set[str] = set()
    for path in paths:
        real = os.path.abspath(path)
        if real in seen:
            raise UserError(f"{pattern}: names {path} twice")
        seen.add(real)
    return paths


def holds_shards(folder: str) -> bool:
    """Whether a local folder is one of shards, and not of class folders."""
    found = [(e.name, e.is_dir()) for e in listing(folder) if not e.name.startswith(".")]
    if any(name.endswith(".tar") for name, _ in found):
        return True
    if any(is_folder for _, is_folder in found):
        return False
    return any(tar.COMPRESSED_NAME.search(name) for name, _ in found) or bool(
        inventory.recorded_shards(folder)
    )


def _in_folder(folder: str) -> list[str]:
    names = [entry.name for entry in listing(folder)]
    found = [name for name in names if name.endswith(".tar") and not name.startswith(".")]
    check_one_split(folder, found)
    compressed = [name for name in names if tar.COMPRESSED_NAME.search(name)]
    forgotten = [
        name
        for name in compressed
        if not found or inventory.set_of(_plain(name)) == inventory.set_of(found[0])
    ]
    if forgotten and not set(map(_plain, forgotten)) <= set(found):
        raise UserError(
            f"{folder}: {forgotten[0]} is compressed ({len(forgotten)} such files); {inventory.UNPACK}"
        )
    recorded = [
        name
        for name in inventory.recorded_shards(folder)
        if not found or inventory.set_of(name) == inventory.set_of(found[0])
    ]
    if not found and not recorded:
        raise UserError(f"{folder}: there are no shards (*.tar) in it")
    return [os.path.join(folder, name) for name in sorted({*found, *recorded})]


def _matching(pattern: str) -> list[str]:
    folders = [os.path.dirname(pattern)]
    if WILDCARD.search(folders[0]):
        folders = glob.glob(folders[0])
    base = os.path.basename(pattern)
    return glob.glob(pattern) + [path for f in folders for path in inventory.recorded_like(f, base)]


def _plain(compressed: str) -> str:
    return tar.COMPRESSED_NAME.sub("", compressed) + ".tar"


def brace_expand(pattern: str) -> list[str]:
    """``a-{00..12}.tar`` and ``{a,b}.tar``, as a shell expands them."""
    from braceexpand import braceexpand

    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"{pattern}: its braces do not match ({error})") from None


def check_one_split(folder: str, names: Sequence[str]) -> None:
    """Raise UserError where the names of a folder's shards differ by more than their numbers."""
    prefixes = sorted({inventory.set_of(name) for name in names})
    if len(prefixes) > 1:
        raise UserError(
            f"{folder}: holds the shards of several sets ({', '.join(prefixes[:4])}); name one, "
            f"as in {os.path.join(folder, prefixes[0])}"
        )


def check_train_glob(pattern: str, paths: Sequence[str]) -> None:
    """Raise UserError where one glob pattern of training shards also names those of another split.

    ``::`` and lists say what they mean.
    """
    if "::" in pattern.replace("://", "") or not WILDCARD.search(pattern):
        return
    sets = sorted({inventory.set_of(os.path.basename(plain(path))) for path in paths})
    others = [name for name in sets if OTHER_SPLITS & set(re.split(r"[^a-z]+", name.lower()))]
    if others and len(others) < len(sets):
        own = next(name for name in sets if name not in others)
        raise UserError(
            f"data.train={mask(pattern)}: names the shards of {own} and of {others[0]}, so that validation images would be trained "
            f"on; a narrower pattern ({own.replace('*', '[0-9]*')}) names one, `A::B` both"
        )


def open_local(paths: Sequence[str], *, problems: list[str] | None = None) -> Shards:
    """Samples and sizes of local shards, from the catalogues of their folders or else from their own indexes.

    Shards without samples are left out.

    Args:
        problems: takes the messages about shards that cannot be used, which are then left out; None raises the first.

    Raises:
        UserError: a shard is not there or has no index, or records contradict its index.
    """

    def problem(text: str) -> None:
        if problems is None:
            raise UserError(text)
        problems.append(text)

    lost = set(inventory.missing(paths))
    if lost:
        problem(inventory.missing_message(sorted(lost)))
    folders = {os.path.dirname(path) for path in paths}
    catalogues = {folder: read_catalogue(folder or ".") for folder in folders}
    recorded = {folder: inventory.recorded_shards(folder or ".") for folder in folders}

    def read(path: str) -> CatalogueEntry | str:
        try:
            return CatalogueEntry.of(read_index(path))
        except UserError as error:
            return inventory.no_shard_message(path) or str(error)

    known: dict[str, CatalogueEntry] = {}
    for path in paths:
        folder, name = os.path.split(path)
        if path not in lost and name in catalogues[folder]:
            known[path] = catalogues[folder][name]
    # A catalogue tells enough to open a set, but not to read it: the first epoch would end at such a shard.
    indexes = {index_path(path): path for path, entry in known.items() if entry.samples}
    if bare := [indexes[index] for index in inventory.missing(list(indexes))]:
        problem(inventory.no_index_message(bare))
        lost.update(bare)
    entries: dict[str, CatalogueEntry | str] = {
        path: entry for path, entry in known.items() if path not in lost
    }
    unknown = [path for path in paths if path not in lost and path not in entries]
    with ThreadPoolExecutor(16) as pool:
        entries.update(zip(unknown, pool.map(read, unknown)))
    good: list[tuple[str, CatalogueEntry]] = []
    for path in paths:
        entry = entries.get(path)
        if isinstance(entry, CatalogueEntry):
            folder, name = os.path.split(path)
            entry = inventory.disagreement(path, entry.samples, recorded[folder].get(name)) or entry
        if isinstance(entry, str):
            problem(entry)
        elif entry is not None and entry.samples:
            good.append((path, entry))
    return Shards.build([path for path, _ in good], [entry for _, entry in good])


def verify_sizes(shards: Shards, size: Callable[[int], int | None], *, rank: int = 0, world: int = 1) -> None:
    """Compare the sizes of this rank's part of the shards with their indexes.

    Args:
        size: bytes of a shard by its number, None where its server does not say. Raises UserError.

    Raises:
        UserError: one is missing or of another size.
    """

    def check(shard: int) -> None:
        found = size(shard)
        if found is not None:
            check_size(shards.paths[shard], found, int(shards.sizes[shard]))

    with ThreadPoolExecutor(16) as pool:
        for _ in pool.map(check, range(rank, len(shards.paths), world)):
            pass
