"""What should be in a folder of shards, by the records beside them, compared with what is there.

A download or copy that stopped leaves a set that looks whole: only its records know better. They are our catalogue, the
hub's ``_info.json``, and the manifests of ``data pack``.
"""

from __future__ import annotations

import fnmatch
import glob
import json
import os
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dattrain.data.classes import few
from dattrain.data.source import tar
from dattrain.data.source.files import open_file
from dattrain.data.source.index import (
    CATALOGUE,
    elsewhere,
    index_path,
    read_catalogue,
    read_dropped,
    read_record,
)
from dattrain.errors import UserError

HUB_INFO = "_info.json"
MANIFESTS = "_*.manifest.json"
SYNSET_TAR = re.compile(r"(?:^|/)(n\d{8})\.tar$")
"""What the tar of a class is called in ImageNet's releases."""
UNPACK = "gunzip, unzstd or unxz it: shards must be plain .tar files, in which any image can be found"


@dataclass(frozen=True)
class ShardRecord:
    """What a record says of a shard: its samples; ``record`` is the record's file name."""

    samples: int
    record: str


def recorded_shards(folder: str) -> dict[str, ShardRecord]:
    """Shard file name to what the records of a local folder say of it; those that were dropped are left out.

    Raises:
        UserError: a record is damaged.
    """
    found: dict[str, ShardRecord] = {}
    for record, lengths in _records(folder).items():
        found.update({name: ShardRecord(count, record) for name, count in lengths.items()})
    for name, entry in read_catalogue(folder).items():
        found.setdefault(name, ShardRecord(entry.samples, CATALOGUE))
    dropped = read_dropped(folder)
    return {name: recorded for name, recorded in found.items() if name not in dropped}


def complete_hub_info(folder: str, names: Collection[str]) -> list[str]:
    """The hub's record of a folder, if it also holds where only the shards of these names are; else nothing."""
    sets = {set_of(name) for name in names}
    lengths = _records(folder).get(HUB_INFO)
    whole = lengths is not None and all(name in names for name in lengths if set_of(name) in sets)
    return [HUB_INFO] if whole else []


def _records(folder: str) -> dict[str, dict[str, int]]:
    """Samples per shard as each record but the catalogue says, by the record's file name."""
    found = {}
    for path in [*sorted(Path(folder).glob(MANIFESTS)), Path(folder) / HUB_INFO]:
        data, read = read_record(path), _hub if path.name == HUB_INFO else _manifest
        # A file of that name and another purpose says nothing of shards.
        if data is not None and (b'"splits"' if read is _hub else b'"shards"') in data:
            found[path.name] = _lengths(data, str(path), read)
    return found


def set_of(name: str) -> str:
    """What the names of one set's shards have in common: all but the last number."""
    return re.sub(r"\d+(?=\D*$)", "*", name)


def recorded_like(folder: str, pattern: str) -> list[str]:
    """Paths of the shards that the records of a folder name and whose file names fit a glob pattern."""
    return [
        os.path.join(folder, name) for name in recorded_shards(folder) if fnmatch.fnmatchcase(name, pattern)
    ]


def missing(paths: Sequence[str]) -> list[str]:
    """Those of the paths where no file is. Lists each folder once: thousands of shards may lie far away."""
    names: dict[str, set[str] | None] = {}

    def there(path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in names:
            names[folder] = _files(folder or ".")
        found = names[folder]
        return os.path.exists(path) if found is None else name in found

    return [path for path in paths if not there(path)]


def missing_message(lost: Sequence[str], where: str | None = None) -> str:
    """What to tell the user of shards that are not there; ``where`` is a folder of links to them, to be put right instead."""
    folder, name = os.path.split(lost[0])
    recorded = recorded_shards(folder or ".").get(name)
    named = f"{recorded.record} beside it names it" if recorded else "it is named"
    dropping = f"say that it is gone for good with `dattrain data index {_set_beside(lost[0], where)} --drop`"
    # What only a list or a brace pattern names stays named, whatever a catalogue says.
    known = recorded or where or os.path.islink(lost[0])
    return f"{lost[0]}: is missing{_more(lost)}, though {named}; fetch or pack it again, or " + (
        dropping if known else "name the others alone"
    )


def _set_beside(path: str, where: str | None = None) -> str:
    """The set of a shard as a word of a shell: a folder may hold several sets. ``where`` is another folder than its own."""
    folder, name = os.path.split(path)
    # A name without a number is a pattern too: only patterns name what is not there.
    pattern = (
        "*".join(map(glob.escape, set_of(name).split("*")))
        if re.search(r"\d", name)
        else f"[{name[0]}]{name[1:]}"
    )
    return shlex.quote(os.path.join(glob.escape(where or folder), pattern))


def no_index_message(bare: Sequence[str]) -> str:
    """What to tell the user of shards that lack their index."""
    way = elsewhere(os.path.dirname(bare[0])) or f"build it with `dattrain data index {_set_beside(bare[0])}`"
    return f"{bare[0]}: has no index ({os.path.basename(index_path(bare[0]))}){_more(bare)}; {way}"


def disagreement(path: str, samples: int, recorded: ShardRecord | None) -> str | None:
    """What to tell the user of a shard whose index has another number of samples than a record says."""
    if recorded is None or recorded.samples == samples:
        return None
    record = os.path.join(os.path.dirname(path), recorded.record)
    return (
        f"{path}: its index has {samples:,} samples, {recorded.record} beside it says {recorded.samples:,}; fetch or pack it "
        f"again, or remove {record} if it is out of date"
    )


def class_tar(path: str) -> bool:
    """Whether a tar is ImageNet's own: the images of one synset, which its name is, without labels; or holds such tars."""
    try:
        members = list(islice((m for m in tar.scan(path, unterminated=True) if m.readable), 2))
    except UserError:
        return False
    if members and SYNSET_TAR.search(members[0].name):
        return True
    extensions = [tar.split_name(member.name)[1].lower() for member in members]
    return bool(SYNSET_TAR.search(path) and not {"cls", "json"} & set(extensions))


def no_shard_message(path: str) -> str | None:
    """What to tell the user who takes something else for a shard; None where it may be one.

    That is no file, a compressed one, a tar of a class, or a list or array of images.
    """
    if re.search(r"\.(csv|tsv|lst|list|npz|idx3?|gz)$|ubyte$", path) and not tar.COMPRESSED_NAME.search(path):
        return f"{path}: is no tar; make shards of such a list or array with `dattrain data pack {path} OUT`"
    if tar.COMPRESSED_NAME.search(path):
        return f"{path}: is compressed; {UNPACK}"
    try:
        os.close(open_file(path))
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    if not class_tar(path):
        return None
    source = (os.path.dirname(path) or ".") if SYNSET_TAR.search(path) else path
    return (
        f"{path}: has no labels, its images are sorted into a tar per class, as ImageNet is given out; make shards of them "
        f"with `dattrain data pack {source} OUT`"
    )


def gaps(paths: Iterable[str]) -> list[str]:
    """Shards whose numbers lie between those that are there, while no file has them."""
    sets: dict[tuple[str, str, int], set[int]] = {}
    for path in paths:
        match = re.fullmatch(r"(.*?)(\d+)(\D*)", path)
        if match:
            sets.setdefault((match[1], match[3], len(match[2])), set()).add(int(match[2]))
    found = []
    for (head, tail, width), numbers in sets.items():
        # Where most numbers are not there, they are no count of shards.
        absent = max(numbers) - min(numbers) + 1 - len(numbers)
        if absent <= len(numbers):
            span = range(min(numbers), max(numbers))
            found += [f"{head}{number:0{width}d}{tail}" for number in span if number not in numbers]
    return found


def parse_hub_info(data: bytes, name: str) -> dict[str, int]:
    """Samples per shard file from timm's ``_info.json``: ``splits.<split>.{filenames, shard_lengths}``.

    Raises:
        UserError: it does not say so.
    """
    return _lengths(data, name, _hub)


def _hub(content: Any) -> Iterable[tuple[str, int]]:
    for split in content["splits"].values():
        yield from zip(split["filenames"], split["shard_lengths"], strict=True)


def _manifest(content: Any) -> Iterable[tuple[str, int]]:
    return [(shard["name"], shard["samples"]) for shard in content["shards"]]


def _lengths(data: bytes, name: str, read: Callable[[Any], Iterable[tuple[str, int]]]) -> dict[str, int]:
    try:
        return {os.path.basename(shard): int(count) for shard, count in read(json.loads(data))}
    except Exception as error:  # whatever is in a file that came from somewhere else
        raise UserError(
            f"{name}: does not say how many samples each shard has ({type(error).__name__}: {error}); "
            "restore it, or move it away"
        ) from error


def _files(folder: str) -> set[str] | None:
    """Names in a folder, without links that lead nowhere; None where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return {e.name for e in entries if not e.is_symlink() or os.path.exists(e.path)}
    except OSError:
        return None


def _more(paths: Sequence[str]) -> str:
    """All but the first, whose message it is."""
    names = few([os.path.basename(path) for path in paths[1:]])
    return f" (and {len(paths) - 1:,} more: {names})" if names else ""
