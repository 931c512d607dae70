"""Class names of shards: read from the manifests that ``data pack`` leaves beside them, and agreed on before it writes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dattrain.data import labels
from dattrain.data.classes import Classes, bare_numbers, few, unique
from dattrain.data.source.download import Refused
from dattrain.data.source.files import read_file
from dattrain.data.source.index import read_json, to_json, write_atomically
from dattrain.data.source.inventory import MANIFESTS
from dattrain.data.source.sample import Dataset
from dattrain.errors import UserError
from dattrain.urls import beside, plain

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading and parsing a damaged manifest raises."""
_COPIED = "copied_from"
"""In a manifest beside links to shards: those of the shards' own folders. ``histogram`` then counts whole sets."""


@dataclass(frozen=True)
class Named:
    """Names of labels 0, 1, ..., which of these have samples (None where that is not said), and what ``Dataset`` has by these names."""

    classes: tuple[str, ...]
    used: frozenset[int] | None
    maskless: str = ""
    category_ids: tuple[int | None, ...] | None = None


def class_names(
    paths: Sequence[str], read: Callable[[str], bytes], lists: Sequence[str] = ()
) -> Named | None:
    """What the manifests of shards say of their labels; None where there is none, or none that names classes.

    Args:
        paths: of the shards, or URLs.
        read: gives the bytes of a path or URL. Raises FileNotFoundError.
        lists: of these shards, beside which a manifest may lie too: a signed URL opens one file alone.

    Raises:
        UserError: shards that number their classes differently, or of which only some have names.
    """
    manifests: dict[str, dict[str, Named]] = {}
    found: dict[tuple[str, ...] | None, str] = {}
    used: set[int] | None = set()
    maskless = ""
    ids: list[tuple[int | None, ...] | None] = []
    for path in paths:
        name = os.path.basename(plain(path))
        file = f"_{re.sub(r'-[0-9]+[.]tar$', '', name)}.manifest.json"
        named = None
        for place in (path, *lists):
            manifest = beside(place, file) if "://" in place else os.path.join(os.path.dirname(place), file)
            if manifest not in manifests:
                manifests[manifest] = _read(manifest, read)
            named = named or manifests[manifest].get(name)
        found.setdefault(None if named is None else named.classes, plain(path))
        if named is not None and used is not None:
            used = None if named.used is None else used | named.used
        maskless = maskless or (named.maskless if named else "")
        if named is not None and named.category_ids not in ids:
            ids.append(named.category_ids)
    if len(found) > 1:
        (some, one), (others, other) = list(found.items())[:2]
        what = "one has names of its classes and the other has none" if some is None or others is None else (
            f"label 0 to {len(some) - 1} are {few(some)} there, and 0 to {len(others) - 1} are {few(others)} here"
        )  # fmt: skip
        raise UserError(
            f"{one} and {other} number their classes each in its own way: {what}; pack them together, or train on one"
        )
    names = next(iter(found), None)
    if names is None:
        return None
    return Named(names, None if used is None else frozenset(used), maskless, _joined_ids(ids))


def _joined_ids(
    found: Sequence[tuple[int | None, ...] | None],
) -> tuple[int | None, ...] | None:
    """The ids of categories by which all shards go; None where some shards call a class otherwise than others, or do not say."""
    known = [ids for ids in found if ids is not None]
    if not known or len(known) < len(found):
        return None
    by_class = [{one for one in row if one is not None} for row in zip(*known)]
    if any(len(row) > 1 for row in by_class):
        return None
    joined = tuple(next(iter(row), None) for row in by_class)
    there = [one for one in joined if one is not None]
    return joined if len(set(there)) == len(there) else None


def copy_manifests(out: str) -> None:
    """Write into a folder of links to shards what the manifests beside the shards themselves say, of the linked ones alone.

    Raises:
        UserError: a manifest is damaged, ``out`` has one that is no such copy, or two of one name number classes differently.
    """
    linked: dict[str, str] = {}
    for name in sorted(os.listdir(out)):
        link = os.path.join(out, name)
        if name.endswith(".tar") and os.path.islink(link):
            linked[name] = os.path.dirname(os.path.abspath(os.path.join(out, os.readlink(link))))
    copies: dict[str, dict[str, Any]] = {}
    for path in (
        path for folder in sorted(set(linked.values())) for path in sorted(Path(folder).glob(MANIFESTS))
    ):
        content = read_json(path)
        if not isinstance(content, dict) or "shards" not in content:
            continue  # a file of that name and another purpose
        try:
            shards = [shard for shard in content["shards"] if linked.get(shard["name"]) == str(path.parent)]
            if not shards:
                continue
            copy = copies.setdefault(path.name, {**content, "shards": [], _COPIED: []})
            if (copy.get("classes") or None) != (content.get("classes") or None):
                raise UserError(
                    f"{path}: names other classes than {copy[_COPIED][0]}; link the shards beside each into a folder of their own"
                )
            copy["shards"] += shards
            copy[_COPIED].append(str(path))
            before, more = copy.get("histogram"), content.get("histogram")
            if content.get("maskless"):
                copy["maskless"] = content["maskless"]
            if copy.get("category_ids") != content.get("category_ids"):
                copy["category_ids"] = None  # splits of one name, whose files have ids of their own
            copy["histogram"] = None if before is None or more is None else {**before, **more}
            copy["samples"] = sum(shard["samples"] for shard in copy["shards"])
            copy["bytes"] = sum(shard.get("bytes", 0) for shard in copy["shards"])
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: is no manifest ({type(error).__name__}: {error}); restore it, or move it away"
            ) from error
    for name, copy in copies.items():
        target = Path(out, name)
        there = None if target.is_symlink() else read_json(target)
        if there is not None and not (isinstance(there, dict) and _COPIED in there):
            raise UserError(
                f"{target}: is there already, and is no copy of {copy[_COPIED][0]}; use another folder"
            )
        write_atomically(target, to_json(copy, indent=1))


def classes_to_pack(
    folder: Path, source: Dataset, splits: Collection[str], label_set: str | None
) -> Sequence[str] | None:
    """Give a source the class numbers that a packing into ``folder`` takes: a class has one number there.

    Args:
        splits: that are packed; the manifests of the folder's others say how classes are numbered.
        label_set: of ``data.labels``, whose numbers synsets take; None leaves it to the other splits, else to the source.

    Returns:
        Names of labels 0, 1, ... as the source tells them from now on; None for bare numbers.

    Raises:
        UserError: a class that the label set or another split has not, or a damaged manifest.
    """
    beside = None
    for path in sorted(folder.glob(MANIFESTS)):
        try:
            manifest = json.loads(read_file(path))
            named = named_in(manifest)
            if named is None or manifest["split"] in splits:
                continue
            other, beside = (
                beside,
                Classes(len(named.classes), named.classes, f"its split {manifest['split']!r}"),
            )
        except _UNREADABLE as error:
            raise UserError(
                f"{path}: cannot be read ({type(error).__name__}: {error}); it says how another split of this folder numbers "
                "its classes: restore it, or pack into another folder"
            ) from error
        if other is not None and other.names != beside.names:
            raise UserError(
                f"{folder}: {other.source} and {beside.source} number their classes each in its own way ({few(other.names)}; "
                f"{few(beside.names)}); pack into another folder"
            )
    if label_set is not None:
        known = labels.label_set(label_set).synsets
        if source.classes is None:
            raise UserError(
                f"{source.name}: its labels are numbers; --label-set {label_set} numbers classes that are synsets"
            )
        if beside is not None and beside.names != known:
            raise UserError(
                f"{folder}: {beside.source} numbers its classes otherwise ({few(beside.names)}) than --label-set "
                f"{label_set}; a class has one number in a folder: pack into another one"
            )
        beside = Classes(len(known), known, f"--label-set {label_set}")
    if source.classes is None:
        if beside is not None:
            bare_numbers(beside, (), source.name)
        return None
    own = unique(source.classes, source.name)
    if beside is None:
        return own
    there = set(beside.names)
    missing = [name for name in own if name not in there]
    if missing and label_set is None:
        raise UserError(
            f"{folder}: {beside.source} has no class {missing[0]!r} ({few(beside.names)}), and {source.name} has; a class has "
            "one number in a folder: pack the training set first, or into another folder"
        )
    source.renumber(beside.numbers(own, source.name))
    return beside.names


def named_in(manifest: Any) -> Named | None:
    """The class names in the content of a manifest; None where it names none.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is no manifest.
    """
    if not isinstance(manifest, dict):
        raise TypeError("no JSON object")
    if not manifest.get("classes"):
        return None
    histogram = manifest.get("histogram")
    used = None if histogram is None else frozenset(map(int, histogram))
    if not isinstance(manifest["classes"], list):
        raise TypeError("classes is no list")
    classes = unique(list(map(str, manifest["classes"])), "classes")
    if used and not 0 <= max(used) < len(classes):
        raise ValueError(f"label {max(used)} of {len(classes)} classes")
    return Named(classes, used, str(manifest.get("maskless") or ""), _category_ids(manifest, len(classes)))


def _category_ids(manifest: Mapping[str, Any], classes: int) -> tuple[int | None, ...] | None:
    """Those of a manifest; None where it has none, as those of before there were any. Raises ValueError."""
    found = manifest.get("category_ids")
    if found is None:
        return None
    if (
        not isinstance(found, list)
        or len(found) != classes
        or not all(one is None or type(one) is int for one in found)
    ):
        raise ValueError(f"category_ids are no list of {classes} ids")
    return tuple(found)


def _read(path: str, read: Callable[[str], bytes]) -> dict[str, Named]:
    """Class names by shard, of a manifest; empty where there is none or it names no classes."""
    try:
        content = json.loads(read(path))
        named = named_in(content)
        if named is None:
            return {}
        return dict.fromkeys((str(shard["name"]) for shard in content["shards"]), named)
    except (FileNotFoundError, NotADirectoryError, Refused):
        return {}  # a bucket that may not be listed refuses what is not there
    except _UNREADABLE as error:
        raise UserError(
            f"{path}: says what the labels of the shards beside it mean, and cannot be read "
            f"({type(error).__name__}: {error}); restore it, or pack the set again"
        ) from error
