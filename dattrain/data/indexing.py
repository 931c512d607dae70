"""Building indexes for shards that others wrote, by reading tar headers alone.

Layouts: a sample is the consecutive members of one key (the name up to the first dot of its last part); its image is
the member with an image's extension; its label stands in ``.cls``, or in a field of ``.json``.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256

from dattrain.data import tar
from dattrain.data.dataset import IMAGE_EXTENSIONS
from dattrain.data.index import (
    NO_LABEL,
    Entry,
    ShardIndex,
    index_path,
    read_catalogue,
    read_index,
    write_catalogue,
    write_index,
)
from dattrain.data.workers import Workers
from dattrain.errors import UserError

LABEL_FIELDS = ("label", "cls", "class_id")


@dataclass(frozen=True)
class Indexed:
    """One indexed shard.

    Attributes:
        path, entry: of the shard.
        no_image, no_label: keys of samples that lack one.
        together: share of neighbours with the same label; near 1 where the shard was written class by class.
    """

    path: str
    entry: Entry
    no_image: list[str]
    no_label: list[str]
    together: float


def index_shards(
    paths: Sequence[str],
    *,
    jobs: int = 1,
    force: bool = False,
    checksum: bool = False,
    label: str | None = None,
    unterminated: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Indexed]:
    """Index local shards, write each index beside its shard, and enter them in the catalogues of their folders.

    Args:
        force: index anew what has an index already; else such shards are only entered in the catalogue.
        checksum: also compute the SHA-256 of each shard, which reads every byte.
        label: field of ``.json`` that holds the label; None takes ``.cls``, else the first of label, cls, class_id.
        unterminated: accept tars without their end marker.

    Raises:
        UserError: a shard is no whole tar, or a member's name is not to be trusted.
    """

    def work(number: int) -> Indexed:
        path = paths[number]
        index = None
        if not force and os.path.exists(index_path(path)):
            index = read_index(path)
            if index.size != os.stat(path).st_size or (checksum and not index.sha256):
                index = None
        if index is None:
            index = build(path, checksum=checksum, label=label, unterminated=unterminated)
            write_index(path, index)
        no_image = [index.key(i) for i in range(len(index)) if not index.offsets[i]]
        no_label = [index.key(i) for i in range(len(index)) if index.labels[i] == NO_LABEL]
        same = index.labels[1:] == index.labels[:-1]
        return Indexed(path, Entry.of(index), no_image, no_label, float(same.mean()) if len(same) else 0.0)

    done: list[Indexed] = []
    try:
        with Workers(work, count=len(paths), workers=jobs if jobs > 1 else 0, in_order=False) as shards:
            for shard in shards:
                done.append(shard)
                progress(len(done), len(paths))
    finally:
        # What was indexed before an error stays indexed, so that a second try need not begin anew.
        _catalogue(done)
    order = {path: i for i, path in enumerate(paths)}
    return sorted(done, key=lambda shard: order[shard.path])


def build(
    path: str, *, checksum: bool = False, label: str | None = None, unterminated: bool = False
) -> ShardIndex:
    """The index of one local shard; arguments and errors as for ``index_shards``."""
    try:
        with open(path, "rb", buffering=0) as file:
            return _build(path, file, checksum=checksum, label=label, unterminated=unterminated)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _build(
    path: str, file: io.FileIO, *, checksum: bool, label: str | None, unterminated: bool
) -> ShardIndex:
    offsets, lengths, labels, keys = [], [], [], []
    seen: set[str] = set()
    for key, members in _samples(tar.scan(path, unterminated=unterminated)):
        if key in seen:
            raise UserError(
                f"{path}: sample {key!r} comes twice, the second time at offset {members[0].offset}; its members "
                "must stand together, and keys must be unique within a shard"
            )
        seen.add(key)
        images = [m for m in members if m.name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS]
        if len(images) > 1:
            raise UserError(
                f"{path}: sample {key!r} at offset {images[0].offset} has {len(images)} images "
                f"({', '.join(os.path.basename(m.name) for m in images)}); it must have one"
            )
        offsets.append(images[0].offset if images else 0)
        lengths.append(images[0].size if images else 0)
        labels.append(_label(path, key, members, file.fileno(), label))
        keys.append(key)
    if not keys:
        raise UserError(f"{path}: a tar without samples")
    digest = sha256()
    if checksum:
        while block := file.read(1 << 20):
            digest.update(block)
    size = os.fstat(file.fileno()).st_size
    return ShardIndex.build(
        offsets, lengths, labels, keys, size=size, sha256=digest.hexdigest() if checksum else ""
    )


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member, as WebDataset splits them: at the first dot of the last part."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def _samples(members: Iterable[tar.Member]) -> Iterator[tuple[str, list[tar.Member]]]:
    key, group = None, []
    for member in members:
        its, extension = split_name(member.name)
        if not extension or os.path.basename(its) == "":
            continue  # files without extension and hidden ones belong to no sample
        if its != key and key is not None:
            yield key, group
            group = []
        key = its
        group.append(member)
    if key is not None:
        yield key, group


def _label(path: str, key: str, members: list[tar.Member], fd: int, field: str | None) -> int:
    by_extension = {split_name(m.name)[1].lower(): m for m in members}
    where = f"{path}: sample {key!r}"
    if field is None and "cls" in by_extension:
        member = by_extension["cls"]
        text = os.pread(fd, member.size, member.offset)
        if not re.fullmatch(rb"\s*-?\d+\s*", text):
            raise UserError(f"{where} at offset {member.offset}: its .cls holds {text[:40]!r}, not a number")
        return _non_negative(int(text), f"{where} at offset {member.offset}")
    if "json" not in by_extension:
        return NO_LABEL
    member = by_extension["json"]
    try:
        content = json.loads(os.pread(fd, member.size, member.offset))
    except ValueError as error:
        raise UserError(f"{where} at offset {member.offset}: its .json does not parse ({error})") from None
    for name in (field,) if field else LABEL_FIELDS:
        value = content.get(name) if isinstance(content, dict) else None
        if isinstance(value, int) and not isinstance(value, bool):
            return _non_negative(value, f"{where} at offset {member.offset}")
        if isinstance(value, str) and value.isdigit():
            return int(value)
    if field:
        raise UserError(f"{where} at offset {member.offset}: its .json has no integer field {field!r}")
    return NO_LABEL


def _non_negative(label: int, where: str) -> int:
    if label < 0:
        raise UserError(f"{where}: label {label} is negative")
    return label


def _catalogue(shards: list[Indexed]) -> None:
    folders: dict[str, dict[str, Entry]] = {}
    for shard in shards:
        folder, name = os.path.split(shard.path)
        folders.setdefault(folder or ".", {})[name] = shard.entry
    for folder, entries in folders.items():
        known = read_catalogue(folder)
        # Entries whose shard is gone would claim samples that nobody has.
        kept = {name: entry for name, entry in known.items() if os.path.exists(os.path.join(folder, name))}
        write_catalogue(folder, {**kept, **entries})
