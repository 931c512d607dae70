"""Shards at ``s3://``, ``gs://``, ``https://`` or ``hf://``: opened by their catalogue, read through a local cache.

``open_remote`` finds the shards of a pattern and how many samples each has, from what lies beside them: our
catalogue, the hub's ``_info.json``, or the index of each shard. ``RemoteSource`` delivers their bytes; the rank's main
process fetches the shards of the window ahead in the background, and a worker that needs a shard before that waits
for it or fetches it.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import numpy as np

from dattrain.data.cache import Cache
from dattrain.data.index import CATALOGUE, Entry, ShardIndex, index_path, parse_catalogue
from dattrain.data.inventory import HUB_INFO, parse_hub_info
from dattrain.data.shards import Shards, brace_expand, check_one_split, check_size
from dattrain.data.transfer import Transfer
from dattrain.errors import ConfigError, UserError

log = logging.getLogger(__name__)

_THREADS = 4
_MAX_OPEN = 128
_TOUCH_EVERY = 256


def open_remote(
    spec: str,
    *,
    cache_dir: str | None,
    cache_gb: float,
    verify: bool = False,
    rank: int = 0,
    world: int = 1,
    transfer: Transfer | None = None,
) -> tuple[Shards, RemoteSource]:
    """Open a remote set of shards.

    Args:
        spec: a folder, a shard, a brace or glob pattern, a ``.txt`` list, or several of them with ``::``.
        cache_dir: folder on the node's own disk.
        cache_gb: bound of the cache in 10^9 bytes, over all processes of the node.
        verify: compare the sizes of this rank's part of the shards with what their source says.
        transfer: how to read; the default is for networks at large.

    Raises:
        ConfigError: no ``cache_dir``.
        UserError: nothing is there, it cannot be read, nothing says how many samples the shards have, or a size is wrong.
    """
    if cache_dir is None:
        raise ConfigError(
            f"{spec} is remote, so data.cache_dir must name a folder for its shards, on a disk of the node"
        )
    transfer = transfer or Transfer()
    catalogues = _Catalogues(transfer)
    urls = expand_remote(spec, transfer, catalogues)
    shards = Shards.build(urls, catalogues.entries(urls))
    largest = int(shards.sizes.max())
    if largest > cache_gb * 1e9:
        raise ConfigError(
            f"data.cache_gb={cache_gb:g} does not hold the largest shard of {spec}, which has {largest / 1e9:.3g}"
        )
    if verify:
        mine = range(rank, len(urls), world)
        with ThreadPoolExecutor(16) as pool:
            for i, size in zip(mine, pool.map(lambda i: transfer.size(urls[i]), mine)):
                if size is not None:
                    check_size(urls[i], size, int(shards.sizes[i]))
    return shards, RemoteSource(shards, Cache(cache_dir, int(cache_gb * 1e9)), transfer)


def expand_remote(spec: str, transfer: Transfer, catalogues: _Catalogues | None = None) -> list[str]:
    """URLs of the shards that a pattern names.

    Raises:
        UserError: nothing is there, or a folder holds the shards of more than one split.
    """
    if "::" in spec:
        return [url for part in spec.split("::") for url in expand_remote(part, transfer, catalogues)]
    if spec.endswith(".txt"):
        base = spec.rpartition("/")[0]
        try:
            lines = transfer.read(spec).decode().splitlines()
        except FileNotFoundError:
            raise UserError(f"{spec}: there is no such list") from None
        names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        return [name if "://" in name else f"{base}/{name}" for name in names]
    urls = brace_expand(spec)
    if any(re.search(r"[*\[]", url) for url in urls):
        urls = [found for url in urls for found in transfer.glob(url)]
    elif len(urls) == 1 and not spec.endswith(".tar"):
        folder = spec.rstrip("/")
        known = (catalogues or _Catalogues(transfer)).ours(folder)
        names = sorted(known or (n for n in transfer.listing(folder) if n.endswith(".tar")))
        check_one_split(folder, names)
        urls = [f"{folder}/{name}" for name in names]
    if not urls:
        raise UserError(f"{spec}: there are no shards there")
    return urls


class _Catalogues:
    """What lies beside the shards and says how many samples each has; read once per folder."""

    def __init__(self, transfer: Transfer) -> None:
        self.transfer = transfer
        self._ours: dict[str, dict[str, Entry]] = {}
        self._hub: dict[str, dict[str, int]] = {}

    def ours(self, folder: str) -> dict[str, Entry]:
        """Our catalogue of a folder; empty where there is none."""
        if folder not in self._ours:
            url = f"{folder}/{CATALOGUE}"
            try:
                self._ours[folder] = parse_catalogue(self.transfer.read(url), url)
            except FileNotFoundError:
                self._ours[folder] = {}
        return self._ours[folder]

    def hub(self, folder: str) -> dict[str, int]:
        """Samples per shard from the hub's ``_info.json`` (timm's format); empty where there is none."""
        if folder not in self._hub:
            url = f"{folder}/{HUB_INFO}"
            try:
                self._hub[folder] = parse_hub_info(self.transfer.read(url), url)
            except FileNotFoundError:
                self._hub[folder] = {}
        return self._hub[folder]

    def entries(self, urls: Sequence[str]) -> list[Entry]:
        """One entry per shard.

        Raises:
            UserError: nothing says how many samples one has.
        """
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(self._entry, urls)) if self._prepare(urls) else []

    def _prepare(self, urls: Sequence[str]) -> bool:
        for folder in dict.fromkeys(url.rpartition("/")[0] for url in urls):
            self.ours(folder) or self.hub(folder)
        return bool(urls)

    def _entry(self, url: str) -> Entry:
        folder, _, name = url.rpartition("/")
        entry = self.ours(folder).get(name)
        if entry is not None:
            return entry
        try:
            if name in self._hub.get(folder, {}):
                size = self.transfer.size(url)
                if size is None:
                    raise UserError(f"{url}: its server does not say how many bytes it has")
                return Entry(self._hub[folder][name], size, "")
            index = index_path(url)
            return Entry.of(ShardIndex.from_bytes(self.transfer.read(index), index))
        except FileNotFoundError:
            raise UserError(
                f"{url}: there is no such shard, or nothing beside it says how many samples it has: neither "
                f"{CATALOGUE} nor {HUB_INFO} nor {os.path.basename(index_path(url))}; "
                "run `dattrain data index` where the shards are, and put what it writes beside them"
            ) from None


class RemoteSource:
    """A ``Source`` of remote shards. See ``dattrain.data.shards.Source``.

    Attributes:
        cache: where the shards are kept; its bound is the node's.
    """

    def __init__(self, shards: Shards, cache: Cache, transfer: Transfer) -> None:
        self.shards = shards
        self.cache = cache
        self.transfer = transfer
        self._ahead = _Ahead(self)
        self._reset()

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """See ``Source.read``."""
        self._after_fork()
        file = self._file(shard)
        data = os.pread(file.fd, length, offset)
        if len(data) != length:
            raise UserError(
                f"{self.shards.paths[shard]}: ends before byte {offset + length}, which its index says it has; "
                "the shard is not the one that was indexed: index it anew with `dattrain data index --force`"
            )
        return data

    def index(self, shard: int) -> ShardIndex:
        """See ``Source.index``. Kept in the cache too; made from the shard itself where there is none beside it."""
        self._after_fork()
        url = self.shards.paths[shard]
        name = self.name(shard) + ".index.npz"
        fd = self.cache.open(name)
        if fd is None:
            try:
                data = self.transfer.read(index_path(url))
            except FileNotFoundError:
                data = self._made_index(shard).to_bytes()
            fd = self.cache.fetch(name, len(data), lambda fd: os.pwrite(fd, data, 0))
            assert fd is not None
        with open(fd, "rb") as file:
            return ShardIndex.from_bytes(file.read(), index_path(url))

    def ahead(self, shards: Sequence[int]) -> None:
        """See ``Source.ahead``."""
        self._after_fork()
        self._ahead.want(shards)

    def close(self) -> None:
        """End the background work and let go of the files; what is in the cache stays."""
        self._ahead.close()
        with self._lock:
            self._open.clear()

    def name(self, shard: int) -> str:
        """Name of a shard in the cache; another size or checksum, and another place, are another name."""
        url = self.shards.paths[shard]
        what = f"{url.rpartition('/')[0]} {self.shards.sizes[shard]} {self.shards.sha256[shard]}"
        return f"{sha256(what.encode()).hexdigest()[:12]}-{url.rpartition('/')[2]}"

    def fetch(self, shard: int, *, wait: bool = True, keep: Sequence[str] = ()) -> int | None:
        """A descriptor of the shard in the cache, fetched where needed; see ``Cache.fetch``."""
        url, size, checksum = (
            self.shards.paths[shard],
            int(self.shards.sizes[shard]),
            self.shards.sha256[shard],
        )

        def write(fd: int) -> None:
            log.debug("fetching %s", url)
            self.transfer.download(url, fd, size, checksum)

        return self.cache.fetch(self.name(shard), size, write, wait=wait, keep=keep)

    def _file(self, shard: int) -> _File:
        with self._lock:
            file = self._open.get(shard)
            if file is not None and file.evicted():
                file = self._open.pop(shard) and None
            if file is not None:
                self._open.move_to_end(shard)
                file.reads += 1
                if file.reads % _TOUCH_EVERY == 0:
                    self.cache.touch(self.name(shard))
                return file
        name = self.name(shard)
        fd = self.cache.open(name)
        if fd is None:
            fd = self.fetch(shard)
        assert fd is not None
        file = _File(fd)
        with self._lock:
            # A file that was evicted leaves the disk when the last descriptor is closed.
            for other in [s for s, f in self._open.items() if f.evicted()]:
                del self._open[other]
            self._open[shard] = file
            if len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)
        return file

    def _made_index(self, shard: int) -> ShardIndex:
        from dattrain.data.indexing import build

        while True:
            file = self._file(shard)
            try:
                index = build(str(self.cache.folder / self.name(shard)))
                break
            except UserError:
                if not file.evicted():
                    raise
        expected = int(self.shards.samples[shard])
        if len(index) != expected:
            raise UserError(
                f"{self.shards.paths[shard]}: holds {len(index)} samples, {HUB_INFO} says {expected}"
            )
        return index

    def _reset(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _File] = OrderedDict()

    def _after_fork(self) -> None:
        if self._owner != os.getpid():
            # The parent's threads are not here, and may have held a lock when it forked.
            self._reset()
            self._ahead = _Ahead(self)


class _File:
    """An open shard."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.reads = 0

    def __del__(self) -> None:
        os.close(self.fd)

    def evicted(self) -> bool:
        """Whether it is no longer in the cache's folder."""
        return os.fstat(self.fd).st_nlink == 0


class _Ahead:
    """Fetches wanted shards in the background, in the order of need, as far as they fit beside each other."""

    def __init__(self, source: RemoteSource) -> None:
        self.source = source
        self._condition = threading.Condition()
        self._wanted: list[int] = []
        self._queue: list[int] = []
        self._threads: list[threading.Thread] = []
        self._closed = False

    def want(self, shards: Sequence[int]) -> None:
        """Replace what is wanted."""
        cache, source = self.source.cache, self.source
        sizes = np.cumsum(source.shards.sizes[np.asarray(shards, dtype=np.int64)])
        size = int(sizes[-1]) if len(shards) else 0
        if size > cache.limit and not self._wanted:
            log.warning(
                "data.cache_gb=%g is less than the %.3g GB of shards that this rank reads from at once, so they will be "
                "fetched again and again; make it larger, or data.window or data.lanes smaller",
                cache.limit / 1e9,
                size / 1e9,
            )
        # Those needed first are touched last, so they are the last to go.
        for shard in reversed(shards):
            cache.touch(source.name(shard))
        with self._condition:
            self._wanted = list(shards)
            # Only what fits beside all that is needed before it, lest a later shard take an earlier one's room.
            fits = [s for s, total in zip(shards, sizes.tolist()) if total <= cache.limit]
            self._queue = [s for s in fits if source.name(s) not in cache]
            if self._queue and not self._threads and not self._closed:
                self._threads = [
                    threading.Thread(target=self._work, name=f"fetch-{i}", daemon=True)
                    for i in range(_THREADS)
                ]
                for thread in self._threads:
                    thread.start()
            self._condition.notify_all()

    def close(self) -> None:
        """End the threads, after the shards in transfer."""
        with self._condition:
            self._closed, self._queue = True, []
            self._condition.notify_all()
        for thread in self._threads:
            thread.join(timeout=5)

    def _work(self) -> None:
        while True:
            with self._condition:
                while not self._queue and not self._closed:
                    self._condition.wait()
                if self._closed:
                    return
                shard = self._queue.pop(0)
                keep = self._wanted[: self._wanted.index(shard)]
            try:
                fd = self.source.fetch(shard, wait=False, keep=[self.source.name(s) for s in keep])
            except Exception as error:
                # Whoever reads the shard meets the same error, in a place where it can be raised.
                log.warning("fetching ahead: %s", error)
                continue
            if fd is not None:
                os.close(fd)
