"""The index of a shard: where each sample's image lies, its label and key; and the catalogue of a folder of shards.

``<name>.index.npz`` beside ``<name>.tar`` holds arrays alone, so that nothing is unpickled; ``_catalogue.json`` in the
folder repeats what opening a set needs (samples, size, checksum per shard), so that thousands of shards open by
reading one file, and a shard's own index is read when its first sample is.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dattrain.errors import UserError

FORMAT = 1
CATALOGUE = "_catalogue.json"
NO_LABEL = -1


@dataclass(frozen=True)
class ShardIndex:
    """Samples of one shard in the order of the tar.

    Attributes:
        offsets: n int64, of the image's first byte in the tar; 0 where the sample has no image member.
        lengths: n int64, bytes of the image; 0 for an empty member too.
        labels: n int64; ``NO_LABEL`` where the sample has none.
        size: bytes of the tar.
        sha256: of the whole tar, or "" where it was not computed.
    """

    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    labels: NDArray[np.int64]
    size: int
    sha256: str
    _key_bytes: NDArray[np.uint8]
    _key_ends: NDArray[np.int64]

    @classmethod
    def build(
        cls,
        offsets: list[int],
        lengths: list[int],
        labels: list[int],
        keys: list[str],
        *,
        size: int,
        sha256: str,
    ) -> ShardIndex:
        """An index from one entry per sample."""
        encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
        return cls(
            np.asarray(offsets, dtype=np.int64),
            np.asarray(lengths, dtype=np.int64),
            np.asarray(labels, dtype=np.int64),
            size,
            sha256,
            np.frombuffer(b"".join(encoded), dtype=np.uint8),
            np.cumsum([len(key) for key in encoded], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.offsets)

    def key(self, sample: int) -> str:
        """Key of a sample: the tar member's name without its extension."""
        start = self._key_ends[sample - 1] if sample else 0
        return self._key_bytes[start : self._key_ends[sample]].tobytes().decode("utf-8", "surrogateescape")

    def to_bytes(self) -> bytes:
        """The content of an index file."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            format=np.int64(FORMAT),
            offsets=self.offsets,
            lengths=self.lengths,
            labels=self.labels,
            size=np.int64(self.size),
            sha256=np.frombuffer(self.sha256.encode(), dtype=np.uint8),
            key_bytes=self._key_bytes,
            key_ends=self._key_ends,
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> ShardIndex:
        """Read the content of an index file; ``name`` is for messages.

        Raises:
            UserError: it is cut short, of another format, or inconsistent.
        """
        try:
            if not zipfile.is_zipfile(io.BytesIO(data)):  # what numpy says of that is to load it unsafely
                raise ValueError(f"it begins with {data[:16]!r}")
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                if int(file["format"]) != FORMAT:
                    raise UserError(
                        f"{name}: index format {int(file['format'])}, this version reads {FORMAT}; "
                        "build it anew with `dattrain data index --force`"
                    )
                index = cls(
                    file["offsets"],
                    file["lengths"],
                    file["labels"],
                    int(file["size"]),
                    file["sha256"].tobytes().decode(),
                    file["key_bytes"],
                    file["key_ends"],
                )
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{name}: not a readable index ({type(error).__name__}: {error}); "
                "build it anew with `dattrain data index --force`"
            ) from error
        index._check(name)
        return index

    def _check(self, name: str) -> None:
        n = len(self.offsets)
        ends = self.offsets + self.lengths
        if not (
            len(self.lengths) == len(self.labels) == len(self._key_ends) == n
            and (n == 0 or (self.offsets.min() >= 0 and self.lengths.min() >= 0 and ends.max() <= self.size))
            and (n == 0 or self._key_ends[-1] == len(self._key_bytes))
        ):
            raise UserError(
                f"{name}: the index contradicts itself; build it anew with `dattrain data index --force`"
            )


@dataclass(frozen=True)
class Entry:
    """What the catalogue says of a shard."""

    samples: int
    size: int
    sha256: str
    max_label: int = NO_LABEL

    @classmethod
    def of(cls, index: ShardIndex) -> Entry:
        """The entry of an indexed shard."""
        return cls(len(index), index.size, index.sha256, int(index.labels.max(initial=NO_LABEL)))


def index_path(shard: str) -> str:
    """Path or URL of the index beside a shard."""
    return (shard[: -len(".tar")] if shard.endswith(".tar") else shard) + ".index.npz"


def read_index(shard: str) -> ShardIndex:
    """The index beside a local shard.

    Raises:
        UserError: there is none, or it is unreadable.
    """
    path = index_path(shard)
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{shard}: has no index ({os.path.basename(path)}); build it with `dattrain data index {shard}`"
        ) from None
    return ShardIndex.from_bytes(data, path)


def write_index(shard: str, index: ShardIndex) -> None:
    """Publish the index beside a local shard."""
    write_atomically(Path(index_path(shard)), index.to_bytes())


def parse_catalogue(data: bytes, name: str) -> dict[str, Entry]:
    """Read the content of a catalogue: shard file name to entry. Raises UserError when it is not one."""
    try:
        content = json.loads(data)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
        return {
            shard: Entry(int(e["samples"]), int(e["size"]), str(e["sha256"]), int(e["max_label"]))
            for shard, e in content["shards"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{name}: not a readable catalogue ({error}); run `dattrain data index --force`"
        ) from error


def read_catalogue(folder: str | Path) -> dict[str, Entry]:
    """The catalogue of a local folder, empty where there is none."""
    path = Path(folder) / CATALOGUE
    try:
        return parse_catalogue(path.read_bytes(), str(path))
    except FileNotFoundError:
        return {}


def write_catalogue(folder: str | Path, entries: Mapping[str, Entry]) -> None:
    """Publish the catalogue of a local folder."""
    shards = {name: asdict(entry) for name, entry in sorted(entries.items())}
    text = json.dumps({"format": FORMAT, "shards": shards}, indent=0)
    write_atomically(Path(folder) / CATALOGUE, text.encode())


def write_atomically(path: Path, data: bytes) -> None:
    """Write aside, flush to the disk, rename: a reader sees the old file or the new one, whole.

    Raises:
        UserError: the disk is full, or the folder may not be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        aside.unlink(missing_ok=True)
