"""What a training set is, in a few checksums: whether a later start has the same samples in the same order. Pure of torch.

A set is a list of parts (``A::B`` has two), each a JSON object: ``set``, what the names of its shards have in common;
``shards`` and ``samples``, how many; and SHA-256 of the names, of the samples per shard, of the sizes and of the contents, all
in order; of files with annotations, what tells these from others. What is not known (the contents of shards without index, the sizes of a stream) is null. Folders and servers are not
in it: data may move.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from itertools import groupby
from typing import Any

from dattrain.data.annotations.annotated import AnnotatedFiles
from dattrain.data.source.dataset import Dataset, FolderDataset, ShardDataset
from dattrain.data.source.inventory import set_of
from dattrain.data.source.shards import Shards
from dattrain.urls import plain

Part = Mapping[str, Any]

_PARTS = 16
"""Above it names follow no pattern, and all are one part: an identity stays small."""
_DIGESTS = {
    "names": "other names or another order",
    "counts": "other numbers of samples in them",
    "sizes": "other sizes",
    "contents": "other contents",
    "annotations": "other annotations",
}
_OPTIONAL = ("annotations",)
"""What only annotated files have: those of shards are in their contents."""


def of_dataset(dataset: Dataset) -> list[Part]:
    """The identity of a set that is open."""
    if isinstance(dataset, ShardDataset):
        return of_shards(dataset.shards)
    digests: dict[str, str | None] = {}
    if isinstance(dataset, FolderDataset):
        digests = {"names": dataset.digest}
    elif isinstance(dataset, AnnotatedFiles):
        digests = {"names": dataset.digest, "annotations": dataset.annotation_digest}
    return [_part("files", len(dataset.counts), int(dataset.counts.sum()), **digests)]


def of_shards(shards: Shards) -> list[Part]:
    """The identity of a set of shards; those without samples are in no order and so not in it."""
    rows = zip(
        _names(shards.paths), shards.samples.tolist(), shards.sizes.tolist(), shards.sha256, strict=True
    )
    found = []
    for name, members in _groups([row for row in rows if row[1]]):
        names, counts, sizes, contents = zip(*members, strict=True)
        found.append(
            _part(
                name,
                len(names),
                sum(counts),
                names=_digest(names),
                counts=_digest(counts),
                sizes=_digest(sizes),
                contents=_digest(contents) if all(contents) else None,
            )
        )
    return found


def of_stream(urls: Sequence[str], samples: int) -> list[Part]:
    """The identity of a stream of shards, whose content nobody has counted: ``samples`` is what the recipe says.

    Commands (``pipe:``) may hold a new key each day, and are counted alone.
    """
    known = not any(url.startswith("pipe:") for url in urls)
    return [_part("stream", len(urls), samples, names=_digest(_names(urls)) if known else None)]


def difference(then: Sequence[Part], now: Sequence[Part]) -> str | None:
    """What differs between two sets, as ``what there was, now what there is``; None where what is known of both is equal."""
    if [part.get("set") for part in then] != [part.get("set") for part in now]:
        return f"{_list(then)}, now {_list(now)}"
    for a, b in zip(then, now, strict=True):
        if (a["shards"], a["samples"]) != (b["shards"], b["samples"]):
            return f"{_say(a)}, now {_count(b)}"
        unequal = [
            what
            for key, what in _DIGESTS.items()
            if None not in (a.get(key), b.get(key)) and a[key] != b[key]
        ]
        if unequal:
            return f"{_say(a)}, now as many with {' and '.join(unequal)}"
    return None


def _part(name: str, shards: int, samples: int, **digests: str | None) -> Part:
    return {
        "set": name,
        "shards": shards,
        "samples": samples,
        **dict.fromkeys(key for key in _DIGESTS if key not in _OPTIONAL),
        **digests,
    }


def _groups(rows: Sequence[tuple[str, int, int, str]]) -> list[tuple[str, list[tuple[str, int, int, str]]]]:
    groups = [(name, list(members)) for name, members in groupby(rows, key=lambda row: set_of(row[0]))]
    return groups if len(groups) <= _PARTS else [("*.tar", list(rows))]


def _names(paths: Iterable[str]) -> list[str]:
    return [os.path.basename(plain(path)) for path in paths]


def _digest(values: Iterable[object]) -> str:
    return sha256("\n".join(map(str, values)).encode(errors="surrogateescape")).hexdigest()


def _say(part: Part) -> str:
    return f"{part['set']}: {part['shards']} shards of {part['samples']} samples" if part["set"] != "files" else (
        f"{part['samples']} files"
    )  # fmt: skip


def _count(part: Part) -> str:
    return f"{part['shards']} of {part['samples']}" if part["set"] != "files" else str(part["samples"])


def _list(parts: Sequence[Part]) -> str:
    return "; ".join(map(_say, parts[:4])) + ("; ..." if len(parts) > 4 else "")
