"""Which shards a remote pattern names, and what lies beside them that says how many samples each has."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from dattrain.data.source.download import Refused, Transfer
from dattrain.data.source.index import (
    CATALOGUE,
    CatalogueEntry,
    ShardIndex,
    index_path,
    parse_catalogue,
    read_record,
)
from dattrain.data.source.inventory import HUB_INFO, parse_hub_info
from dattrain.data.source.shards import WILDCARD, brace_expand, check_one_split, list_lines
from dattrain.errors import UserError
from dattrain.urls import beside, parts, plain, split_query, with_query

T = TypeVar("T")


def is_remote(spec: str) -> bool:
    """Whether a specification names URLs: itself, or in a local list.

    Raises:
        UserError: some of it is remote and some is local.
    """
    if "://" not in spec and not spec.endswith(".txt"):
        return False
    kinds = {part: "://" in part or _lists_urls(part) for part in parts(spec)}
    if len(set(kinds.values())) > 1:
        local = next(part for part, remote in kinds.items() if not remote)
        raise UserError(f"{spec}: {local} is local and the rest is remote; a set is one or the other")
    return all(kinds.values())


def _lists_urls(path: str) -> bool:
    if not path.endswith(".txt") or not os.path.isfile(path):
        return False
    lines = list_lines(path, read_record(Path(path)) or b"")
    remote = [line for line in lines if "://" in line]
    if remote and len(remote) != len(lines):
        local = next(line for line in lines if "://" not in line)
        raise UserError(f"{path}: {local!r} is local and other lines are URLs; a set is one or the other")
    return bool(remote)


def expand_remote(spec: str, transfer: Transfer, catalogues: Catalogues | None = None) -> list[str]:
    """URLs of the shards that a specification names: folders, shards, brace or glob patterns and lists, with ``::`` between.

    A query string stays on the URL of each shard. The names in a list are relative to its folder and share its query
    string, or are URLs of their own.

    Raises:
        UserError: nothing is there, or a folder holds the shards of more than one split.
    """
    catalogues = catalogues or Catalogues(transfer)
    return [url for part in parts(spec) for url in _expand(part, transfer, catalogues)]


def _expand(spec: str, transfer: Transfer, catalogues: Catalogues) -> list[str]:
    path, query = split_query(spec)
    if path.endswith(".txt"):
        urls = _listed(spec, transfer, catalogues)
    else:
        paths = brace_expand(path)
        if any(map(_wild, paths)):
            if query:
                raise UserError(
                    f"{spec}: a pattern with * ? or [] is looked up in the listing of its folder, for which a URL with a query "
                    "string is not good; name the shards with braces, as in {0000..0127}, or in a .txt list"
                )
            paths = [found for each in paths for found in _looked_up(each, transfer, catalogues)]
        elif len(paths) == 1 and not path.endswith(".tar"):
            paths = _folder(path.rstrip("/"), query, transfer, catalogues)
        urls = [with_query(each, query) for each in paths]
    if not urls:
        raise UserError(f"{spec}: there are no shards there")
    return urls


def _looked_up(pattern: str, transfer: Transfer, catalogues: Catalogues) -> list[str]:
    """What a wildcard names; a shard that the catalogue has and the server lacks is not skipped.

    Raises:
        UserError: there is nothing like it, or less than the catalogue has.
    """
    if not _wild(pattern):
        return [pattern]
    found = transfer.glob(pattern)
    if not found:
        raise UserError(f"{pattern}: there are no shards there")
    folder, name = _place(pattern)
    if not _wild(folder):
        known = catalogues.ours(folder)
        _compare(folder, [each for each in known if fnmatch.fnmatchcase(each, name)], map(_name, found))
    return found


def _wild(url: str) -> bool:
    """Whether it has a wildcard, apart from the brackets of an IPv6 address."""
    return WILDCARD.search(url.partition("://")[2].partition("/")[2]) is not None


def _compare(folder: str, known: Iterable[str], found: Iterable[str]) -> None:
    gone = sorted(set(known) - set(found))
    if gone:
        more = f" and {len(gone) - 3} more" if len(gone) > 3 else ""
        raise UserError(
            f"{folder}: {', '.join(gone[:3])}{more}: in its {CATALOGUE} and not there; restore what is missing, or index the "
            "shards anew with `dattrain data index`"
        )


def _name(url: str) -> str:
    return _place(url)[1]


def _listed(spec: str, transfer: Transfer, catalogues: Catalogues) -> list[str]:
    try:
        data = transfer.read(spec) if "://" in spec else read_record(Path(spec))
    except FileNotFoundError:
        data = None
    if data is None:
        raise UserError(f"{spec}: there is no such list")
    urls = [line if "://" in line else beside(spec, line) for line in list_lines(spec, data)]
    catalogues.listed(spec, urls)
    return urls


def _folder(folder: str, query: str, transfer: Transfer, catalogues: Catalogues) -> list[str]:
    known = catalogues.ours(f"{folder}/", query)
    seen: list[str] = []
    # A web server's page about a folder is nothing to hold a catalogue against; a bucket's listing is.
    if not known or folder.partition("://")[0] not in ("http", "https"):
        try:
            seen = [n for n in transfer.listing(with_query(folder, query)) if n.endswith(".tar")]
        except FileNotFoundError:
            pass
        except Refused:
            if not known:
                raise
    if seen:
        _compare(f"{folder}/", known, seen)
    names = sorted({*known, *seen})
    if not names:
        raise UserError(
            f"{folder}: there is no such folder, or its server does not list it: put a {CATALOGUE} in it (`dattrain data "
            "index` writes one), or name the shards with a pattern"
        )
    check_one_split(folder, names)
    return [f"{folder}/{name}" for name in names]


class Catalogues:
    """What lies beside the shards and says how many samples each has; read once per folder."""

    def __init__(self, transfer: Transfer) -> None:
        self.transfer = transfer
        self._ours: dict[str, dict[str, CatalogueEntry]] = {}
        self._hub: dict[str, dict[str, int]] = {}
        self._lists: dict[str, str] = {}
        self._refused: Refused | None = None

    def ours(self, folder: str, query: str = "") -> dict[str, CatalogueEntry]:
        """Our catalogue of a folder, local or remote, whose name ends with a slash or is empty; empty where there is none."""
        if folder not in self._ours:
            self._ours[folder] = self._parsed(with_query(folder + CATALOGUE, query), parse_catalogue) or {}
        return self._ours[folder]

    def hub(self, folder: str, query: str = "") -> dict[str, int]:
        """Samples per shard from the hub's ``_info.json`` (timm's format); empty where there is none."""
        if folder not in self._hub:
            self._hub[folder] = self._parsed(with_query(folder + HUB_INFO, query), parse_hub_info) or {}
        return self._hub[folder]

    def listed(self, name: str, urls: Sequence[str]) -> None:
        """These shards are those of a list, beside which a catalogue may lie too: a signed URL opens one file alone."""
        self._lists.update(dict.fromkeys(urls, name))

    def entries(self, urls: Sequence[str]) -> list[CatalogueEntry]:
        """One entry per shard.

        Raises:
            UserError: nothing says how many samples one has.
        """
        first = {_place(url)[0]: url for url in reversed(urls)}
        for folder, url in first.items():
            query = split_query(url)[1]
            self.ours(folder, query) or self.hub(folder, query)
        for name in set(self._lists.values()):
            self.ours(_place(name)[0], split_query(name)[1])
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(self._entry, urls))

    def _entry(self, url: str) -> CatalogueEntry:
        folder, name = _place(url)
        entry = self._ours[folder].get(name)
        if entry is None and name in self._hub.get(folder, {}):
            entry = self._by_hub(url, self._hub[folder][name])
        if entry is None and url in self._lists:
            entry = self._ours[_place(self._lists[url])[0]].get(name)
        if entry is None:
            index = self._parsed(index_url(url), ShardIndex.from_bytes)
            entry = None if index is None else CatalogueEntry.of(index)
        if entry is None:
            why = f". What was asked for there was refused: {self._refused}" if self._refused else ""
            raise UserError(
                f"{url}: there is no such shard, or nothing beside it says how many samples it has: neither "
                f"{CATALOGUE} nor {HUB_INFO} nor {os.path.basename(index_path(name))}; run `dattrain data index` where "
                f"the shards are, and put what it writes beside them, or its {CATALOGUE} beside a .txt list of them{why}"
            )
        if not (
            0 <= entry.samples < 2**63 and 0 <= entry.size < 2**63 and -(2**63) <= entry.max_label < 2**63
        ):
            raise UserError(
                f"{url}: what lies beside it says that it has {entry.samples} samples, {entry.size} bytes and labels up to "
                f"{entry.max_label}, which cannot be; run `dattrain data index --force` where the shards are"
            )
        return entry

    def _by_hub(self, url: str, samples: int) -> CatalogueEntry:
        try:
            size = self.transfer.size(url)
        except FileNotFoundError:
            raise UserError(f"{url}: there is no such shard, though {HUB_INFO} names it") from None
        if size is None:
            raise UserError(f"{url}: its server does not say how many bytes it has")
        return CatalogueEntry(samples, size, "")

    def _parsed(self, name: str, parse: Callable[[bytes, str], T]) -> T | None:
        """The content of a local or remote file; None where there is none, or where we may not look.

        A bucket that may not be listed says "forbidden" of files that are not there.
        """
        try:
            data = self.transfer.read(name) if "://" in name else read_record(Path(name))
        except FileNotFoundError:
            return None
        except Refused as error:
            self._refused = error
            return None
        return None if data is None else parse(data, name)


def _place(url: str) -> tuple[str, str]:
    """Folder, with its slash, and name of a file."""
    folder, slash, name = split_query(url)[0].rpartition("/")
    return folder + slash, name


def index_url(url: str) -> str:
    """The URL of the index beside a shard."""
    path, query = split_query(url)
    return with_query(index_path(path), query)


def names(urls: Sequence[str]) -> tuple[str, ...]:
    """What the shards are called in messages, in keys of samples and in the cache: their URLs without secrets.

    Raises:
        UserError: one is named twice, be it with different query strings: its samples would be seen twice an epoch.
    """
    found: dict[str, str] = {}
    for url in urls:
        path, query = split_query(url)
        scheme, _, place = plain(url).partition("://")
        known = f"{scheme}://{os.path.normpath(place)}"
        if known in found:
            queries = " with different query strings; the path must be what tells shards apart"
            raise UserError(f"{path}: is named twice{queries if query != found[known] else ''}")
        found[known] = query
    return tuple(plain(url) for url in urls)
