"""Indexing whole sets of shards: each shard's index, the catalogues of their folders, and links where these are read-only."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dattrain.data.classes import few
from dattrain.data.source import inventory
from dattrain.data.source.build_index import build
from dattrain.data.source.files import read_file
from dattrain.data.source.index import (
    NO_LABEL,
    CatalogueEntry,
    LeftOut,
    ShardIndex,
    elsewhere,
    index_path,
    read_catalogue,
    read_dropped,
    read_index,
    write_catalogue,
    write_index,
)
from dattrain.data.source.manifest import class_names, copy_manifests
from dattrain.data.workers import Workers
from dattrain.errors import UserError


@dataclass(frozen=True)
class IndexedShard:
    """One indexed shard.

    Attributes:
        path, entry: of the shard.
        no_image, no_label, no_annotation: keys of samples that lack one, with the reason of the first of them. In annotated
            shards none has a label, and in others none an annotation.
        left_out: members that no sample has, by kind.
        together: share of neighbours with the same label; near 1 where the shard was written class by class.
    """

    path: str
    entry: CatalogueEntry
    no_image: list[str]
    no_label: list[str]
    no_annotation: list[str]
    left_out: tuple[LeftOut, ...]
    together: float


def index_shards(
    paths: Sequence[str],
    *,
    jobs: int = 1,
    force: bool = False,
    checksum: bool = False,
    image: str | None = None,
    label: str | None = None,
    unterminated: bool = False,
    drop: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[IndexedShard]:
    """Index local shards, write each index beside its shard, and enter them in the catalogues of their folders.

    Args:
        paths: of shards; those that are not there stay in the catalogue.
        force: index anew what has an index already, as ``image`` and ``label`` do; else such shards are only entered in
            the catalogue.
        checksum: also compute the SHA-256 of each shard.
        image, label, unterminated: see ``build``.
        drop: note in the catalogue that the shards that are not there are gone for good, and remove links to them.

    Raises:
        UserError: see ``build``; ``label`` for shards whose manifest names the classes of their labels.
    """
    gone = set(inventory.missing(paths))
    there = [path for path in paths if path not in gone]
    named = class_names(there, read_file) if label else None
    if named is not None:
        raise UserError(
            f"{there[0]}: the manifest beside it calls its labels {few(named.classes)}, and --label {label} would give it others; "
            f"make a set of these with `dattrain data pack --label {label}`"
        )

    def work(number: int) -> IndexedShard:
        path = there[number]
        index = None
        if not (force or image or label) and os.path.exists(index_path(path)):
            index = read_index(path)
            if index.size != os.stat(path).st_size or (checksum and not index.sha256):
                index = None
        if index is None:
            index = build(path, checksum=checksum, image=image, label=label, unterminated=unterminated)
            try:
                write_index(path, index)
            except UserError as error:
                advice = elsewhere(os.path.dirname(path))
                raise UserError(f"{error}; {advice}" if advice else str(error)) from error
        no_image = [_named(index, i) for i in range(len(index)) if not index.offsets[i]]
        annotated = index.annotated
        if annotated is None:
            no_label = [_named(index, i) for i in range(len(index)) if index.labels[i] == NO_LABEL]
            no_annotation = []
        else:
            no_label, no_annotation = (
                [],
                [_named(index, i) for i in np.flatnonzero(annotated.offsets == 0).tolist()],
            )
        same = index.labels[1:] == index.labels[:-1]
        together = float(same.mean()) if len(same) else 0.0
        return IndexedShard(
            path, CatalogueEntry.of(index), no_image, no_label, no_annotation, index.left_out, together
        )

    done: list[IndexedShard] = []
    try:
        with Workers(work, count=len(there), workers=jobs if jobs > 1 else 0, in_order=False) as shards:
            for shard in shards:
                done.append(shard)
                progress(len(done), len(there))
    finally:
        # What was indexed before an error stays indexed, so that a second try need not begin anew.
        _catalogue(done, gone if drop else set(), force)
    order = {path: i for i, path in enumerate(there)}
    return sorted(done, key=lambda shard: order[shard.path])


def link_shards(paths: Sequence[str], out: str) -> list[str]:
    """Links to the shards, and the records beside them, in a folder of one's own; returns the links' paths.

    Indexes and a catalogue can be written there where the shards' own folder may not be written. Manifests come as copies
    that name the linked shards alone: a part of a set keeps the names of its classes, and nothing of it is missing. A
    named shard that is not there gets a link that leads nowhere: it is missing there too, until it is back.

    Raises:
        UserError: something else has one of the names in ``out``, or it cannot be written.
    """
    links = {os.path.join(out, os.path.basename(path)): os.path.abspath(path) for path in paths}
    if len(links) < len(paths):
        raise UserError(f"--out {out}: two of the shards have one name; index them in folders of their own")
    folders: dict[str, set[str]] = {}
    for path in links.values():
        folders.setdefault(os.path.dirname(path), set()).add(os.path.basename(path))
    records = [
        os.path.join(folder, record)
        for folder, names in sorted(folders.items())
        for record in inventory.complete_hub_info(folder, names)
    ]
    wanted = {**{os.path.join(out, os.path.basename(record)): record for record in records}, **links}
    if len(wanted) < len(records) + len(links):
        raise UserError(f"--out {out}: the shards' folders ({', '.join(folders)}) have records of one name")
    try:
        os.makedirs(out, exist_ok=True)
        for link, target in wanted.items():
            if os.path.islink(link) and os.readlink(link) == target:
                continue
            if os.path.lexists(link):
                raise UserError(f"{link}: is there already, and is no link to {target}; use another folder")
            os.symlink(target, link)
    except OSError as error:
        raise UserError(f"--out {out}: links cannot be made there ({error.strerror})") from error
    copy_manifests(out)
    return list(links)


def _named(index: ShardIndex, sample: int) -> str:
    key = index.key(sample)
    return f"{key} ({index.why[key]})" if key in index.why else key


def _catalogue(shards: list[IndexedShard], dropped: set[str], force: bool) -> None:
    folders: dict[str, dict[str, CatalogueEntry]] = {}
    for shard in shards:
        folder, name = os.path.split(shard.path)
        folders.setdefault(folder or ".", {})[name] = shard.entry
    gone: dict[str, set[str]] = {}
    for path in dropped:
        folder, name = os.path.split(path)
        gone.setdefault(folder or ".", set()).add(name)
        folders.setdefault(folder or ".", {})
    for path in filter(os.path.islink, dropped):
        try:
            os.unlink(path)
        except OSError as error:
            raise UserError(
                f"{path}: leads nowhere, and cannot be removed ({error.strerror}); remove it"
            ) from error
    for folder, entries in folders.items():
        try:
            known = read_catalogue(folder)
        except UserError:
            if not force:
                raise
            known = {}
        kept = {name: entry for name, entry in known.items() if name not in gone.get(folder, ())}
        write_catalogue(folder, {**kept, **entries}, dropped=read_dropped(folder) | gone.get(folder, set()))
