"""Bytes of remote files through fsspec: in ranges, each with a time limit, tried again after a pause that grows.

fsspec's back ends raise whatever their libraries raise, so every error but a plain "not there" and "not allowed" is
taken for a passing one. Nothing that leaves here holds a URL's secrets, nor has an error behind it that does.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from dattrain.data.source import http, server_errors
from dattrain.data.source.filesystems import FileSystems, inside, is_http, url_like
from dattrain.data.source.hosts import HOSTS, Hosts
from dattrain.data.source.http import NoRanges, Wrong
from dattrain.data.source.shards import check_size
from dattrain.errors import UserError
from dattrain.urls import mask, server, split_query

log = logging.getLogger(__name__)

T = TypeVar("T")

_MIB = 2**20
_SMALLEST_BLOCK = 256 * 1024
_LONGEST_WAIT_S = 600.0
_DENIED = frozenset({400, 401, 403})
_FINAL = frozenset({404, 405, 407, 410})
_EXPIRED = re.compile(
    r"(?<!certificate has )expired|InvalidToken|TokenRefreshRequired|InvalidAccessKeyId", re.IGNORECASE
)


class Refused(UserError):
    """The server does not let us read a file."""


class _Changed(UserError):
    """The file was replaced between two of its blocks."""


class _DiskError(Exception):
    """The error of the disk that is written to is behind this one: no reason to ask the server again."""


class _File:
    """Takes a file in pieces, from its beginning on."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd, self.size = fd, size
        self.at = 0
        self.digest = hashlib.sha256()
        self._version: dict[str, str] = {}

    def version(self, headers: Mapping[str, str]) -> None:
        """Raise _Changed where each validator (RFC 9110, 8.8) of an answer is another than that of the block before.

        Mirrors behind one name may have ETags of their own.
        """
        found = {name: headers[name] for name in ("ETag", "Last-Modified") if name in headers}
        both = found.keys() & self._version.keys()
        if both and all(found[name] != self._version[name] for name in both):
            raise _Changed("it was replaced while it was fetched")
        self._version = found

    def __call__(self, data: bytes) -> None:
        """Write the next piece."""
        if self.at + len(data) > self.size:
            raise Wrong(f"more than {self.size} bytes")
        rest = memoryview(data)
        while rest:
            try:
                done = os.pwrite(self.fd, rest, self.at)
            except OSError as error:
                raise _DiskError from error
            self.digest.update(rest[:done])
            self.at += done
            rest = rest[done:]


class Transfer:
    """Reads remote files; may be used by several threads, and by processes forked from this one.

    Args:
        attempts: of each request before it is given up.
        timeout: seconds for one request, so for one block of a large file; of a file that comes in one piece, since its
            server knows no ranges, and of a small one, seconds without a byte.
        pause: seconds before the second attempt; doubled each time up to ``longest_pause``, with some jitter.
        block: bytes asked for at once; halved, down to 256 KiB, where a request ran out of time.
        hosts: what servers asked for, ``Retry-After`` above all, which is obeyed up to 10 minutes at a time.
    """

    def __init__(
        self,
        *,
        attempts: int = 8,
        timeout: float = 60.0,
        pause: float = 0.5,
        longest_pause: float = 30.0,
        block: int = 16 * _MIB,
        hosts: Hosts = HOSTS,
    ) -> None:
        self.attempts = attempts
        self.timeout = timeout
        self.pause = pause
        self.longest_pause = longest_pause
        self.block = block
        self.hosts = hosts
        self._systems = FileSystems(timeout)

    def read(self, url: str) -> bytes:
        """A whole small file. Raises FileNotFoundError where there is none, UserError where it cannot be read."""
        found = self._retry(url, lambda: self._range(url, None, None))
        assert found is not None  # only a part can be sent whole
        return found

    def part(self, url: str, start: int, end: int) -> bytes | None:
        """Bytes of a file; None where its server knows no ranges. Raises FileNotFoundError or UserError."""

        def once() -> bytes | None:
            try:
                found = self._range(url, start, end)
            except NoRanges:
                return None
            return None if found is None else found[: end - start]

        return self._retry(url, once)

    def listing(self, url: str) -> dict[str, int | None]:
        """Names and sizes of the files right in a folder. Raises UserError."""
        found = self._retry(url, lambda: self._systems.open(url).ls(inside(url), detail=True))
        return {
            os.path.basename(entry["name"].rstrip("/")): entry.get("size")
            for entry in found
            if entry.get("type") == "file"
        }

    def glob(self, url: str) -> list[str]:
        """URLs that match a pattern of ``*``, ``?`` and ``[]``, sorted; none where it cannot be listed. Raises UserError."""
        # In HTTP fsspec takes a ? for the begin of a query string, and would part [!/] at its slash.
        pattern = url.replace("?", "[!?]") if is_http(url) else inside(url)
        try:
            return sorted(
                url_like(url, path)
                for path in self._retry(url, lambda: self._systems.open(url).glob(pattern))
            )
        except FileNotFoundError:
            return []

    def size(self, url: str) -> int | None:
        """Bytes of a file, None where the server does not say. Raises FileNotFoundError or UserError."""
        return self._retry(url, lambda: self._size(url))

    def _size(self, url: str) -> int | None:
        system = self._systems.open(url)
        if not is_http(url):
            size: int | None = system.info(inside(url)).get("size")
            return size
        from fsspec.asyn import sync

        size = sync(system.loop, http.size, system, url, self.timeout)
        return size

    def download(self, url: str, fd: int, size: int, sha256: str = "") -> None:
        """Write a file of ``size`` bytes to a descriptor and compare its checksum where one is known.

        Raises:
            UserError: it is gone or may not be read, is of another size or content in every attempt, or the source
                could not be reached.
        """
        for attempt in range(2):
            try:
                # Where there is a checksum, it alone decides.
                digest = self._fill(url, _File(fd, size), mixed=bool(sha256))
            except _Changed as error:
                if attempt == 0:
                    log.warning("%s: %s; fetching it again", mask(url), error)
                    continue
                raise UserError(
                    f"{url}: {error}, in both attempts, so its parts may be of different files: wait until it is written, or "
                    "index the shards with --checksum, if its server has several copies"
                ) from error
            except _DiskError as error:
                assert error.__cause__ is not None
                raise error.__cause__ from None
            if not sha256 or digest == sha256:
                return
            if attempt == 0:
                log.warning("%s: its checksum is not that of its index; fetching it again", mask(url))
        raise UserError(
            f"{url}: its SHA-256 is {digest[:16]}..., its index was built for {sha256[:16]}...; "
            "the shard was changed or damaged: restore it, or index it anew with `dattrain data index --force`"
        )

    def _fill(self, url: str, file: _File, *, mixed: bool) -> str:
        """Fetch the file, whose blocks may be ``mixed`` of several versions; returns its SHA-256."""
        block = self.block
        while file.at < file.size:
            found, block = self._block(url, file, block, None if mixed else file.version)
            if isinstance(found, _File):
                return found.digest.hexdigest()
            file(found)
        return file.digest.hexdigest()

    def _block(
        self, url: str, file: _File, block: int, version: Callable[[Mapping[str, str]], object] | None
    ) -> tuple[bytes | _File, int]:
        """The next bytes, and the length of block to ask for next; or the file as it was written in one piece."""
        shrunk, at, size = block, file.at, file.size

        def once() -> bytes | _File:
            nonlocal shrunk
            length = min(shrunk, size - at)
            # The last block asks for one byte more, which shows a file that is too long without another request.
            last = at + length == size
            whole = _File(file.fd, size)
            try:
                data = self._range(url, at, at + length + last, whole, version)
            except (TimeoutError, asyncio.TimeoutError):
                shrunk = max(min(_SMALLEST_BLOCK, shrunk), shrunk // 2)
                raise
            except Exception as error:
                if server_errors.status(error) == 416:
                    raise Wrong(f"nothing from offset {at} on") from None
                raise
            if data is None:
                if self.hosts.lacks_ranges(server(url)):
                    log.warning(
                        "%s knows no ranges: a shard comes in one piece, and from its beginning again after each break",
                        server(url),
                    )
                if whole.at != size:
                    raise Wrong(f"{whole.at} bytes, not {size}")
                return whole
            if at == 0 and len(data) == size:
                return data
            if len(data) != length:
                raise Wrong(f"{len(data)} bytes from offset {at} on, not {length}")
            return data

        try:
            return self._retry(url, once), shrunk
        except FileNotFoundError:
            raise UserError(f"{url}: there is no such file") from None
        except Wrong as error:
            found = self._size_or_none(url)
            if found is not None:
                check_size(url, found, size)
            raise UserError(
                f"{url}: sent {error}, which does not fit its index, in {self.attempts} attempts; the server or a proxy cuts it, "
                "or the shard was changed"
            ) from error

    def _size_or_none(self, url: str) -> int | None:
        try:
            return self._size(url)
        except Exception:
            return None

    def _range(
        self,
        url: str,
        start: int | None,
        end: int | None,
        whole: Callable[[bytes], object] | None = None,
        version: Callable[[Mapping[str, str]], object] | None = None,
    ) -> bytes | None:
        """Bytes of a file; None where the server sent it all, and ``whole`` took it."""
        system = self._systems.open(url)
        path = inside(url)
        if not system.async_impl:
            found: bytes | None = system.cat_file(path, start=start, end=end)
            return found
        from fsspec.asyn import sync

        if is_http(url):
            found = sync(system.loop, http.get, system, url, start, end, self.timeout, whole, version)
        else:
            found = sync(system.loop, system._cat_file, path, start=start, end=end, timeout=self.timeout)
        return found

    def _retry(self, url: str, call: Callable[[], T]) -> T:
        """What ``call`` returns, once it does.

        Raises:
            FileNotFoundError: there is no such file.
            Refused: it may not be read, even with credentials that were read anew: those of an hour do expire in a run.
            UserError: every attempt failed.
        """
        pause, attempt, renewed = self.pause, 0, False
        while True:
            self.hosts.wait(server(url))
            used = self._systems.opened(url)
            try:
                return call()
            except (UserError, _DiskError):
                raise
            except Exception as error:
                status, reason = server_errors.status(error), server_errors.reason(error)
                if status == 404:
                    raise FileNotFoundError(mask(url)) from None
                if status in _FINAL or (is_http(url) and isinstance(error, ValueError)):
                    raise Refused(f"{url}: may not be read ({reason}){_spelling(url, error)}") from None
                if status in _DENIED or _EXPIRED.search(reason):
                    if renewed or is_http(url):  # whose credentials are in the URL
                        raise Refused(f"{url}: may not be read ({reason}){_advice(url)}") from None
                    renewed = True
                    self._systems.forget(url, used)
                    log.info("%s: %s; reading the credentials anew", mask(url), reason)
                    continue
                attempt += 1
                asked = server_errors.asked_to_wait(error, self.hosts.wall())
                if attempt == self.attempts:
                    if isinstance(error, Wrong):
                        raise
                    wait = f" (its server asks to wait {asked:.0f} s)" if asked else ""
                    raise UserError(
                        f"{url}: could not be read in {attempt} attempts; the last error was {reason}{wait}"
                    ) from None
                if asked:
                    asked = min(asked, _LONGEST_WAIT_S)
                    if self.hosts.hold(server(url), asked) and asked > pause:
                        log.warning("%s: %s; waiting %.0f s, as its server asks", mask(url), reason, asked)
                if asked < pause:
                    log.info("%s: attempt %d failed (%s); again in %.1f s", mask(url), attempt, reason, pause)
                    self.hosts.sleep(pause * self.hosts.jitter.uniform(0.7, 1.3))
                pause = min(self.longest_pause, 2 * pause)


def _advice(url: str) -> str:
    if not is_http(url):
        return "; its credentials were read anew and did not help: renew them, and resume the run"
    return (
        "; where its signature has expired, give a new URL and resume the run" if split_query(url)[1] else ""
    )


def _spelling(url: str, error: Exception) -> str:
    odd = isinstance(error, ValueError) and "@" in url
    return "; in a user's name or password / ? # [ ] are written %2F %3F %23 %5B %5D" if odd else ""
