"""Bytes of remote files through fsspec: in ranges, each with a time limit, tried again after a pause that grows.

fsspec's back ends raise whatever their libraries raise, so every error but a plain "not there" and "not allowed" is
taken for a passing one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from dattrain.errors import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")

EXTRA = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface-hub",
}
"""What each kind of source needs besides fsspec: the extra ``dattrain[remote]`` has them all."""

_MIB = 2**20
_SMALLEST_BLOCK = 256 * 1024
_FINAL = frozenset({400, 401, 403, 404, 405, 410})


class _Wrong(Exception):
    """What came is not what the index says."""


class Transfer:
    """Reads remote files; may be used by several threads, and by processes forked from this one.

    Args:
        attempts: of each request before it is given up.
        timeout: seconds for one request, so for one block of a large file.
        pause: seconds before the second attempt; doubled each time up to ``longest_pause``, with some jitter.
        block: bytes asked for at once; halved, down to 256 KiB, where a request ran out of time.
    """

    def __init__(
        self,
        *,
        attempts: int = 8,
        timeout: float = 60.0,
        pause: float = 0.5,
        longest_pause: float = 30.0,
        block: int = 16 * _MIB,
    ) -> None:
        self.attempts = attempts
        self.timeout = timeout
        self.pause = pause
        self.longest_pause = longest_pause
        self.block = block
        self._systems: dict[str, Any] = {}
        self._owner = os.getpid()
        # A generator of its own: the global one belongs to the user.
        self._jitter = random.Random()

    def read(self, url: str) -> bytes:
        """A whole small file. Raises FileNotFoundError where there is none, UserError where it cannot be read."""
        return self._retry(url, lambda: self._range(url, None, None))

    def listing(self, url: str) -> dict[str, int | None]:
        """Names and sizes of the files right in a folder. Raises UserError."""
        found = self._retry(url, lambda: self._system(url).ls(_inside(url), detail=True))
        return {
            os.path.basename(entry["name"].rstrip("/")): entry.get("size")
            for entry in found
            if entry.get("type") == "file"
        }

    def glob(self, url: str) -> list[str]:
        """URLs that match a pattern, sorted. Raises UserError."""
        system = self._system(url)
        return sorted(_like(url, path) for path in self._retry(url, lambda: system.glob(_inside(url))))

    def size(self, url: str) -> int | None:
        """Bytes of a file, None where the server does not say. Raises FileNotFoundError or UserError."""
        return self._retry(url, lambda: self._system(url).info(_inside(url)).get("size"))

    def download(self, url: str, fd: int, size: int, sha256: str = "") -> None:
        """Write a file of ``size`` bytes to a descriptor and compare its checksum where one is known.

        Raises:
            UserError: it is gone or may not be read, is of another size or content in every attempt, or the source
                could not be reached.
        """
        for attempt in range(2):
            digest = hashlib.sha256()
            at, block = 0, self.block
            while at < size:
                data, block = self._block(url, at, block, size)
                os.pwrite(fd, data, at)
                digest.update(data)
                at += len(data)
            if not sha256 or digest.hexdigest() == sha256:
                return
            if attempt == 0:
                log.warning("%s: its checksum is not that of its index; fetching it again", url)
        raise UserError(
            f"{url}: its SHA-256 is {digest.hexdigest()[:16]}..., its index was built for {sha256[:16]}...; "
            "the shard was changed or damaged: restore it, or index it anew with `dattrain data index --force`"
        )

    def _block(self, url: str, at: int, block: int, size: int) -> tuple[bytes, int]:
        """The bytes from ``at`` on, and the length of block to ask for next."""
        shrunk = block

        def once() -> bytes:
            nonlocal shrunk
            length = min(shrunk, size - at)
            # The last block asks for one byte more, which shows a file that is too long without another request.
            last = at + length == size
            try:
                data = self._range(url, at, at + length + last)
            except TimeoutError:
                shrunk = max(min(_SMALLEST_BLOCK, shrunk), shrunk // 2)
                raise
            if at == 0 and len(data) == size:
                return data  # the server does not know ranges, and sent everything
            if len(data) != length:
                raise _Wrong(f"{len(data)} bytes from offset {at} on, not {length}")
            return data

        try:
            return self._retry(url, once), shrunk
        except FileNotFoundError:
            raise UserError(f"{url}: there is no such file") from None
        except _Wrong as error:
            found = self._size_or_none(url)
            if found is not None and found != size:
                raise UserError(
                    f"{url}: has {found} bytes, but its index was built for {size}; the shard was changed or cut "
                    "short: restore it, or index it anew with `dattrain data index --force`"
                ) from error
            raise UserError(
                f"{url}: sent {error} as its index says, in {self.attempts} attempts; the server or a proxy cuts it, "
                "or the shard was changed"
            ) from error

    def _size_or_none(self, url: str) -> int | None:
        try:
            return self._system(url).info(_inside(url)).get("size")
        except Exception:
            return None

    def _range(self, url: str, start: int | None, end: int | None) -> bytes:
        system = self._system(url)
        path = _inside(url)
        if not system.async_impl:
            return system.cat_file(path, start=start, end=end)
        from fsspec.asyn import sync

        return sync(system.loop, system._cat_file, path, start=start, end=end, timeout=self.timeout)

    def _retry(self, url: str, call: Callable[[], T]) -> T:
        pause = self.pause
        for attempt in range(1, self.attempts + 1):
            try:
                return call()
            except UserError:
                raise
            except Exception as error:
                final = _final(error)
                if final == 404:
                    raise FileNotFoundError(url) from error
                if final:
                    raise UserError(f"{url}: may not be read ({_reason(error)})") from error
                if attempt == self.attempts:
                    if isinstance(error, _Wrong):
                        raise
                    raise UserError(
                        f"{url}: could not be read in {attempt} attempts; the last error was {_reason(error)}"
                    ) from error
                log.info("%s: attempt %d failed (%s); again in %.1f s", url, attempt, _reason(error), pause)
                time.sleep(pause * self._jitter.uniform(0.7, 1.3))
                pause = min(self.longest_pause, 2 * pause)
        raise AssertionError("unreachable")

    def _system(self, url: str) -> Any:
        if self._owner != os.getpid():
            # Sockets and the thread of the event loop stayed in the parent.
            self._systems, self._owner = {}, os.getpid()
        scheme = url.partition("://")[0]
        if scheme not in self._systems:
            import fsspec

            options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
            if scheme == "s3":
                # Attempts are counted here alone, not multiplied by botocore's.
                options["config_kwargs"] = {
                    "retries": {"max_attempts": 0},
                    "connect_timeout": self.timeout,
                    "read_timeout": self.timeout,
                }
            try:
                self._systems[scheme] = fsspec.filesystem(scheme, **options)
            except (ImportError, ValueError) as error:
                needs = EXTRA.get(scheme)
                hint = f"; install {needs} (pip install dattrain[remote])" if needs else ""
                raise UserError(f"{url}: cannot be opened ({error}){hint}") from error
            if scheme == "s3":
                self._systems[scheme].retries = 1
        return self._systems[scheme]


def _final(error: Exception) -> int:
    """HTTP status of an error that another attempt will not mend, 0 for every other."""
    if isinstance(error, FileNotFoundError):
        # fsspec's HTTP back end says "not found" of everything that kept it from asking for a size.
        cause = error.__cause__
        return 404 if cause is None or (getattr(cause, "status", 404) == 404 and not _network(cause)) else 0
    if isinstance(error, PermissionError):
        return 403
    status = getattr(error, "status", None)
    return status if isinstance(status, int) and status in _FINAL else 0


def _network(error: BaseException) -> bool:
    return isinstance(error, (OSError, TimeoutError))


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _inside(url: str) -> str:
    """A URL as its file system wants it: without the scheme, but for HTTP, whose paths are URLs."""
    scheme, _, path = url.partition("://")
    return url if scheme in ("http", "https") else path


def _like(pattern: str, path: str) -> str:
    scheme = pattern.partition("://")[0]
    return path if "://" in path else f"{scheme}://{path.lstrip('/')}"
