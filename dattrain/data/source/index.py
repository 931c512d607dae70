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
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dattrain import files
from dattrain.data.source.annotation_index import AnnotationIndex, Annotations, as_annotations
from dattrain.data.source.files import explained, read_file
from dattrain.data.source.tar import BLOCK
from dattrain.errors import UserError

FORMAT, ANNOTATED_FORMAT = 1, 2
"""Of indexes: without annotations, which older versions read too, and with them. Catalogues have the first."""
CATALOGUE = "_catalogue.json"
NO_LABEL = -1
MAX_LABEL = 2**24 - 1
"""Far above any set of classes; what is larger is no class number, and tables by label would not fit."""


@dataclass(frozen=True)
class LeftOut:
    """Members of one kind that no sample of the index has.

    Attributes:
        kind: ``.avif``, ``symbolic link``, ...
        count: of them.
        first: name of the first.
        lost: whether a sample lacks its image or label for one of them.
    """

    kind: str
    count: int
    first: str
    lost: bool


def leave_out(counted: dict[str, LeftOut], kind: str, name: str, *, lost: bool, count: int = 1) -> None:
    """Count ``count`` more members of a kind, of which ``name`` is one."""
    before = counted.get(kind, LeftOut(kind, 0, name, False))
    counted[kind] = replace(before, count=before.count + count, lost=before.lost or lost)


@dataclass(frozen=True)
class ShardIndex:
    """Samples of one shard in the order of the tar.

    Attributes:
        offsets: n int64, of the image's first byte in the tar; 0 where the sample has no image member.
        lengths: n int64, bytes of the image; 0 for an empty member too.
        labels: n int64; ``NO_LABEL`` where the sample has none.
        size: bytes of the tar.
        sha256: of the whole tar, or "" where it was not computed.
        linked: n bool, whether the image is that of an earlier member, to which the sample's own is a hard link.
        left_out: members that no sample has, by kind.
        why: key to why it has no image, label or annotation, for the first such samples.
        annotated: where annotations lie; None where it has none.
    """

    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    labels: NDArray[np.int64]
    size: int
    sha256: str
    _key_bytes: NDArray[np.uint8]
    _key_ends: NDArray[np.int64]
    linked: NDArray[np.bool_]
    left_out: tuple[LeftOut, ...] = ()
    why: Mapping[str, str] = field(default_factory=dict)
    annotated: AnnotationIndex | None = None

    @classmethod
    def build(
        cls,
        offsets: list[int],
        lengths: list[int],
        labels: list[int],
        keys: list[str],
        *,
        size: int,
        sha256: str = "",
        linked: Iterable[int] = (),
        left_out: Iterable[LeftOut] = (),
        why: Mapping[str, str] | None = None,
        annotated: AnnotationIndex | None = None,
    ) -> ShardIndex:
        """An index from one entry per sample; ``linked`` are the numbers of those that are hard links."""
        encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
        return cls(
            np.asarray(offsets, dtype=np.int64),
            np.asarray(lengths, dtype=np.int64),
            np.asarray(labels, dtype=np.int64),
            size,
            sha256,
            np.frombuffer(b"".join(encoded), dtype=np.uint8),
            np.cumsum([len(key) for key in encoded], dtype=np.int64),
            np.isin(np.arange(len(encoded)), list(linked)),
            tuple(left_out),
            dict(why or {}),
            annotated,
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
            format=np.int64(FORMAT if self.annotated is None else ANNOTATED_FORMAT),
            offsets=self.offsets,
            lengths=self.lengths,
            labels=self.labels,
            size=np.int64(self.size),
            sha256=np.frombuffer(self.sha256.encode(), dtype=np.uint8),
            key_bytes=self._key_bytes,
            key_ends=self._key_ends,
            **self._rare(),
        )
        return buffer.getvalue()

    def _rare(self) -> dict[str, Any]:
        """What most shards have nothing of, and an index then has no arrays for."""
        found: dict[str, Any] = {"linked": self.linked} if self.linked.any() else {}
        if self.left_out or self.why:
            notes = {"left_out": [astuple(some) for some in self.left_out], "why": self.why}
            found["notes"] = np.frombuffer(json.dumps(notes).encode(), dtype=np.uint8)
        return found if self.annotated is None else {**found, **self.annotated.arrays()}

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
                if int(file["format"]) not in (FORMAT, ANNOTATED_FORMAT):
                    raise UserError(
                        f"{name}: index format {int(file['format'])}, this version reads {FORMAT} and {ANNOTATED_FORMAT}; "
                        "build it anew with `dattrain data index --force`"
                    )
                offsets = file["offsets"]
                notes = json.loads(file["notes"].tobytes()) if "notes" in file else {}
                index = cls(
                    offsets,
                    file["lengths"],
                    file["labels"],
                    int(file["size"]),
                    file["sha256"].tobytes().decode(),
                    file["key_bytes"],
                    file["key_ends"],
                    file["linked"] if "linked" in file else np.zeros(len(offsets), dtype=np.bool_),
                    tuple(
                        LeftOut(str(k), int(n), str(f), bool(x)) for k, n, f, x in notes.get("left_out", ())
                    ),
                    {str(key): str(why) for key, why in notes.get("why", {}).items()},
                    AnnotationIndex.of_arrays(file) if int(file["format"]) == ANNOTATED_FORMAT else None,
                )
                consistent = index._consistent()
        except UserError:
            raise
        except Exception as error:
            # Of damaged files zipfile, zlib, numpy and json raise a dozen types.
            raise UserError(
                f"{name}: not a readable index ({type(error).__name__}: {error}); "
                "build it anew with `dattrain data index --force`"
            ) from error
        if not consistent:
            raise UserError(
                f"{name}: the index contradicts itself; build it anew with `dattrain data index --force`"
            )
        return index

    def _consistent(self) -> bool:
        n, starts = len(self.offsets), np.append(0, self._key_ends[:-1])
        rows = (self.offsets, self.lengths, self.labels, self._key_ends)
        return bool(
            all(row.dtype == np.int64 and row.shape == (n,) for row in rows)
            and self.linked.dtype == np.bool_
            and self.linked.shape == (n,)
            and self._key_bytes.dtype == np.uint8
            and self._key_bytes.ndim == 1
            and self.size >= 0
            and (
                n == 0
                or (
                    self.offsets.min() >= 0
                    and self.lengths.min() >= 0
                    and (self.lengths <= self.size - self.offsets).all()
                    and (self.offsets[self.offsets > 0] >= BLOCK).all()
                    and self.labels.min() >= NO_LABEL
                    and self.labels.max() <= MAX_LABEL
                    and (starts <= self._key_ends).all()
                )
            )
            and (self._key_ends[-1] if n else 0) == len(self._key_bytes)
            and (self.annotated is None or self.annotated.consistent(n, self.size))
        )


@dataclass(frozen=True)
class CatalogueEntry:
    """What the catalogue says of a shard."""

    samples: int
    size: int
    sha256: str
    max_label: int = NO_LABEL
    annotations: Annotations = "none"

    @classmethod
    def of(cls, index: ShardIndex) -> CatalogueEntry:
        """The entry of an indexed shard."""
        kind: Annotations = "none" if index.annotated is None else index.annotated.kind
        return cls(len(index), index.size, index.sha256, int(index.labels.max(initial=NO_LABEL)), kind)

    def to_dict(self) -> dict[str, Any]:
        """What a catalogue holds of it; that it has no annotations is not said, as by older versions."""
        found = asdict(self)
        if self.annotations == "none":
            del found["annotations"]
        return found


def index_path(shard: str) -> str:
    """Path or URL of the index beside a shard."""
    return (shard[: -len(".tar")] if shard.endswith(".tar") else shard) + ".index.npz"


def read_index(shard: str) -> ShardIndex:
    """The index beside a local shard.

    Raises:
        UserError: there is none, or it is unreadable.
    """
    path = index_path(shard)
    data = read_record(Path(path))
    if data is None:
        raise UserError(
            f"{shard}: has no index ({os.path.basename(path)}); "
            + (elsewhere(os.path.dirname(shard)) or f"build it with `dattrain data index {shard}`")
        )
    return ShardIndex.from_bytes(data, path)


def write_index(shard: str, index: ShardIndex) -> None:
    """Publish the index beside a local shard."""
    write_atomically(Path(index_path(shard)), index.to_bytes())


def elsewhere(folder: str) -> str:
    """The way to index shards whose folder may not be written; empty where it may."""
    if os.access(folder or ".", os.W_OK):
        return ""
    return (
        "their folder may not be written: `dattrain data index SHARDS --out DIR` puts links to the shards and their "
        "indexes into a folder of your own, which you name instead"
    )


def parse_catalogue(data: bytes, name: str) -> dict[str, CatalogueEntry]:
    """Read the content of a catalogue: shard file name to entry. Raises UserError when it is not one."""
    try:
        content = json.loads(data)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
        return {str(shard): _entry(e) for shard, e in content["shards"].items()}
    except Exception as error:  # whatever is in a file that came from somewhere else
        raise UserError(
            f"{name}: not a readable catalogue ({error}); run `dattrain data index --force`"
        ) from error


def _entry(content: Mapping[str, object]) -> CatalogueEntry:
    samples, size, label = (content[name] for name in ("samples", "size", "max_label"))
    if not (
        all(type(x) is int for x in (samples, size, label))
        # A sample has a header at least.
        and 0 <= samples <= size // BLOCK < 2**53  # type: ignore[operator]
        and NO_LABEL <= label <= MAX_LABEL  # type: ignore[operator]
    ):
        raise ValueError(f"samples {samples!r}, size {size!r}, max_label {label!r}")
    kind = as_annotations(content.get("annotations", "none"))
    return CatalogueEntry(samples, size, str(content["sha256"]), label, kind)  # type: ignore[arg-type]


def read_catalogue(folder: str | Path) -> dict[str, CatalogueEntry]:
    """The catalogue of a local folder, empty where there is none."""
    path = Path(folder) / CATALOGUE
    data = read_record(path)
    return {} if data is None else parse_catalogue(data, str(path))


def read_dropped(folder: str | Path) -> set[str]:
    """Shards that the user said are gone for good, though records of a local folder name them."""
    data = read_record(Path(folder) / CATALOGUE)
    with suppress(ValueError, RecursionError, AttributeError, TypeError):
        return {str(name) for name in json.loads(data or b"{}").get("dropped", ())}
    return set()


def read_record(path: Path) -> bytes | None:
    """Content of a file beside shards; None where there is none. Raises UserError where it cannot be read."""
    try:
        return read_file(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def read_json(path: Path) -> Any:
    """Content of a JSON object or list; None where there is no such file. Raises UserError where it does not parse."""
    data = read_record(path)
    try:
        found = None if data is None else json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: does not parse ({error}); restore it, or move it away") from error
    if data is not None and not isinstance(found, (dict, list)):
        raise UserError(f"{path}: holds {data[:40]!r}; restore it, or move it away")
    return found


def to_json(content: Any, indent: int | None = None) -> bytes:
    """JSON in UTF-8 for any reader.

    File names that are no UTF-8 (surrogates in Python) come as escapes and are read back as they were.
    """
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(content, indent=indent).encode()


def write_catalogue(
    folder: str | Path, entries: Mapping[str, CatalogueEntry], *, dropped: Iterable[str] | None = None
) -> None:
    """Publish the catalogue of a local folder; ``dropped`` as for ``read_dropped``, and kept when None."""
    shards = {name: entry.to_dict() for name, entry in sorted(entries.items())}
    content: dict[str, object] = {"format": FORMAT, "shards": shards}
    gone = set(read_dropped(folder) if dropped is None else dropped) - set(entries)
    if gone:
        content["dropped"] = sorted(gone)
    write_atomically(Path(folder) / CATALOGUE, json.dumps(content, indent=0).encode())


def write_atomically(path: Path, data: bytes) -> None:
    """``dattrain.files.write_atomically``, flushed to the disk.

    Raises:
        UserError: the disk is full, or the folder may not be written.
    """
    with explained(path, "written"):
        files.write_atomically(path, data, durable=True)
