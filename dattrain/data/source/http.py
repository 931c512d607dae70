"""HTTP on fsspec's sessions, where fsspec's own calls do not do.

A range is asked for without holding more than the range in memory, a server that knows no
ranges is written to a file as it comes, and a failed HEAD says why it failed.

Everything here runs on fsspec's event loop. A status of 400 and above is aiohttp's ``ClientResponseError``.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from typing import Any

from dattrain.urls import split_query, with_query

_CHUNK = 2**20


class Wrong(Exception):
    """What came is not what was asked for, or not what the index says."""


class NoRanges(Wrong):
    """The whole file came, where a part was asked for."""


async def get(
    system: Any,
    url: str,
    start: int | None,
    end: int | None,
    timeout: float,
    whole: Callable[[bytes], object] | None,
    version: Callable[[Mapping[str, str]], object] | None = None,
) -> bytes | None:
    """Bytes ``start`` to ``end`` of a file, up to one more where the server sends too much; all of it where ``start`` is None.

    Args:
        timeout: seconds for a range, or in which something of a whole file must come.
        whole: is given the whole file in pieces, where the server knows no ranges and the first is asked for; None is
            returned then. It runs in a thread.
        version: is given the headers of an answer with a range; raises where that is of another version of the file.

    Raises:
        Wrong: the server sent another range, or no file.
        NoRanges: it sent the whole file where nobody wants it.
    """
    session = await system.set_session()
    headers = {"Accept-Encoding": "identity"}
    if start is not None and end is not None:
        headers["Range"] = f"bytes={start}-{end - 1}"
    began = asyncio.get_running_loop().time()
    async with session.get(_address(system, url), headers=headers, timeout=_patience(timeout)) as answer:
        answer.raise_for_status()
        if start is None or end is None:
            content: bytes = await answer.read()
            return content
        if answer.status == 206:
            began_at = re.match(r"\s*bytes\s+(\d+)", answer.headers.get("Content-Range", ""))
            if began_at and int(began_at[1]) != start:
                raise Wrong(f"bytes from offset {began_at[1]} on, not {start}")
            if version is not None:
                version(answer.headers)
            left = timeout - (asyncio.get_running_loop().time() - began)
            return await asyncio.wait_for(_at_most(answer, end - start + 1), max(left, 0.0))
        if answer.status != 200:
            raise Wrong(f"HTTP status {answer.status} and no file")
        if start > 0 or whole is None:
            raise NoRanges("the whole file, not a part of it")
        async for piece in answer.content.iter_chunked(_CHUNK):
            await asyncio.to_thread(whole, piece)
        return None


async def _at_most(answer: Any, length: int) -> bytes:
    found = bytearray()
    while len(found) < length:
        piece = await answer.content.read(length - len(found))
        if not piece:
            break
        found += piece
    return bytes(found)


async def size(system: Any, url: str, timeout: float) -> int | None:
    """Bytes of a file; None where the server does not say. HEAD, and GET where that is refused: a signature may be for GET."""
    session = await system.set_session()
    for method, asked in (("HEAD", {}), ("GET", {"Range": "bytes=0-0"})):
        headers = {"Accept-Encoding": "identity", **asked}
        async with session.request(
            method, _address(system, url), headers=headers, timeout=_patience(timeout), allow_redirects=True
        ) as answer:
            if method == "HEAD" and answer.status in (400, 401, 403, 404, 405, 501):
                continue
            if answer.status != 416:
                answer.raise_for_status()
            total = re.search(r"/\s*(\d+)$", answer.headers.get("Content-Range", ""))
            if total:
                return int(total[1])
            encoded = answer.headers.get("Content-Encoding", "identity")
            length = answer.headers.get("Content-Length", "")
            if answer.status == 200 and encoded in ("identity", "") and length.isdecimal():
                return int(length)
    return None


def _address(system: Any, url: str) -> Any:
    """The query string as it was given: what was signed may not be quoted anew."""
    path, query = split_query(url)
    address = system.encode_url(path)
    return type(address)(with_query(str(address), query), encoded=True) if query else address


def _patience(silence: float) -> Any:
    import aiohttp

    return aiohttp.ClientTimeout(total=None, connect=silence, sock_connect=silence, sock_read=silence)
