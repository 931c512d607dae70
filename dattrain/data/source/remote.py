"""Shards at ``s3://``, ``gs://``, ``https://`` or ``hf://``: opened by their catalogue, read through a local cache.

``open_remote`` finds the shards of a pattern and how many samples each has (``dattrain.data.source.listing``). ``RemoteSource``
delivers their bytes; the rank's main process fetches the shards of the window ahead in the background, and a worker that
needs a shard before that waits for it or fetches it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from hashlib import sha256

import numpy as np

from dattrain.data.source.disk_cache import Cache, Unwritable
from dattrain.data.source.download import Refused, Transfer
from dattrain.data.source.files import OpenFile
from dattrain.data.source.index import ShardIndex
from dattrain.data.source.listing import Catalogues, expand_remote, index_url, names
from dattrain.data.source.shards import Shards, verify_sizes
from dattrain.errors import ConfigError, UserError
from dattrain.urls import mask

log = logging.getLogger(__name__)

_THREADS = 4
_MAX_OPEN = 128
_TOUCH_EVERY = 256
_SMALL, _PEEK = 64 * 2**20, 8192
"""Bytes: of a shard that is fetched to look at a few samples, and that are asked for at once of a larger one."""


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
            f"{spec} is remote, so data.cache_dir (of `dattrain data` and `dattrain eval`: --cache-dir) must name a folder for its shards, on a "
            "disk of the node"
        )
    transfer = transfer or Transfer()
    catalogues = Catalogues(transfer)
    urls = expand_remote(spec, transfer, catalogues)
    shards = Shards.build(names(urls), catalogues.entries(urls))
    largest = int(shards.sizes.max())
    if largest > cache_gb * 1e9:
        raise ConfigError(
            f"data.cache_gb={cache_gb:g} does not hold the largest shard of {spec}, which has {largest / 1e9:.3g}"
        )
    if verify:
        verify_sizes(shards, lambda i: _size(shards.paths[i], urls[i], transfer), rank=rank, world=world)
    return shards, RemoteSource(shards, urls, Cache(cache_dir, int(cache_gb * 1e9)), transfer)


def _size(path: str, url: str, transfer: Transfer) -> int | None:
    try:
        return transfer.size(url)
    except FileNotFoundError:
        raise UserError(
            f"{path}: there is no such shard, though what lies beside it (or its pattern) names it: restore it, "
            "or index the shards anew with `dattrain data index`"
        ) from None


class RemoteSource:
    """A ``Source`` of remote shards. See ``dattrain.data.source.shards.Source``.

    Attributes:
        shards: named by their URLs without secrets.
        urls: of the shards, with the secrets that they are asked for with.
        cache: where the shards are kept; its bound is the node's.
    """

    def __init__(self, shards: Shards, urls: Sequence[str], cache: Cache, transfer: Transfer) -> None:
        self.shards = shards
        self.urls = tuple(urls)
        self.cache = cache
        self.transfer = transfer
        self._prefetcher = _Prefetcher(self)
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
        index = self._index_beside(shard)
        if index is None:
            index = self._made_index(shard)
            self._keep_index(shard, index)
        return index

    def peek(self, shard: int) -> tuple[ShardIndex, Callable[[int, int], bytes]] | None:
        """See ``Source.peek``. A small shard is fetched; of a large one, parts are asked for."""
        if self.shards.sizes[shard] <= _SMALL or self.name(shard) in self.cache:
            return self.index(shard), partial(self.read, shard)
        path, size, index = self.shards.paths[shard], int(self.shards.sizes[shard]), self._index_beside(shard)
        begin, cached = 0, b""

        def part(offset: int, length: int) -> bytes:
            nonlocal begin, cached
            if not begin <= offset <= offset + length <= begin + len(cached):
                try:
                    found = self.transfer.part(
                        self.urls[shard], offset, min(offset + max(length, _PEEK), size)
                    )
                except FileNotFoundError:
                    raise UserError(f"{path}: there is no such shard") from None
                if found is None or len(found) < length:
                    raise UserError(
                        f"{path}: its server does not send {length} bytes from offset {offset} on"
                    )
                begin, cached = offset, found
            return cached[offset - begin : offset - begin + length]

        return None if index is None else (index, part)

    def _index_beside(self, shard: int) -> ShardIndex | None:
        """The index that lies beside a shard, kept in the cache; None where none does."""
        self._after_fork()
        url = index_url(self.urls[shard])
        name = self.name(shard) + ".index.npz"
        fd = self.cache.open(name)
        if fd is not None:
            # What is in the cache was good once; damaged since, it is fetched anew.
            with open(fd, "rb") as file, suppress(UserError):
                return ShardIndex.from_bytes(file.read(), url)
        try:
            index = ShardIndex.from_bytes(self.transfer.read(url), url)
        except (FileNotFoundError, Refused):
            # A bucket that may not be listed says "forbidden" of what is not there, and a signature is good for one file.
            return None
        self._keep_index(shard, index)
        return index

    def _keep_index(self, shard: int, index: ShardIndex) -> None:
        data = index.to_bytes()
        with suppress(Unwritable):
            fd = self.cache.fetch(
                self.name(shard) + ".index.npz", len(data), lambda fd: os.pwrite(fd, data, 0)
            )
            assert fd is not None
            os.close(fd)

    def prefetch(self, shards: Sequence[int]) -> None:
        """See ``Source.prefetch``."""
        self._after_fork()
        self._prefetcher.want(shards)

    def close(self) -> None:
        """End the background work and let go of the files; what is in the cache stays."""
        self._prefetcher.close()
        with self._lock:
            self._open.clear()

    def name(self, shard: int) -> str:
        """Name of a shard in the cache; another size or checksum, and another place, are another name."""
        url = self.shards.paths[shard]
        what = f"{url.rpartition('/')[0]} {self.shards.sizes[shard]} {self.shards.sha256[shard]}"
        return f"{sha256(what.encode()).hexdigest()[:12]}-{url.rpartition('/')[2]}"

    def fetch(self, shard: int, *, wait: bool = True, keep: Sequence[str] = ()) -> int | None:
        """A descriptor of the shard in the cache, fetched where needed; see ``Cache.fetch``."""
        size, checksum = int(self.shards.sizes[shard]), self.shards.sha256[shard]

        def write(fd: int) -> None:
            log.debug("fetching %s", self.shards.paths[shard])
            self.transfer.download(self.urls[shard], fd, size, checksum)

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
        fd = self.cache.open(name, int(self.shards.sizes[shard]))
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
        from dattrain.data.source.build_index import build

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
                f"{self.shards.paths[shard]}: holds {len(index)} samples, what lies beside it says {expected}"
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
            self._prefetcher = _Prefetcher(self)


class _File(OpenFile):
    """An open shard."""

    reads = 0

    def evicted(self) -> bool:
        """Whether it is no longer in the cache's folder."""
        return os.fstat(self.fd).st_nlink == 0


class _Prefetcher:
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
        until = time.monotonic() + 5
        for thread in self._threads:
            thread.join(timeout=max(0.0, until - time.monotonic()))

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
                log.warning("prefetching: %s", mask(str(error)))
                continue
            if fd is not None:
                os.close(fd)
