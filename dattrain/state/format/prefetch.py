"""Reading rank files front to back: a thread reads and checks a few blocks before they are consumed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dattrain.state.format.rank_file import BLOCK, Digest, Pieces, Reader


@dataclass(frozen=True)
class Span:
    """A byte range ``[begin, end)`` of a file, and what the caller wants to remember about it."""

    begin: int
    end: int
    tag: Any


Part = tuple[Any, int, memoryview]
"""(tag of its span, offset within the span, bytes), within one block."""


@contextmanager
def prefetch(
    files: Sequence[tuple[Path, Digest]],
    choose: Callable[[Pieces], Sequence[Span]],
    *,
    verify: bool = True,
    depth: int = 16,
) -> Iterator[Iterator[tuple[list[Span], Iterator[Part]]]]:
    """Open each of ``files`` once, ask ``choose`` (on the thread) which bytes of it are wanted, and read those.

    What comes is, for every file in its turn, its spans in the file's order and an iterator over their parts, to be used up
    before the next file. A block is read once however many spans, or the header, lie in it. The thread reads from the
    moment of entering, and ends on leaving. Memory is ``depth`` blocks.

    Raises (while iterating):
        Damaged: as ``Reader``; and whatever ``choose`` raises.
    """
    ready: queue.Queue[list[Span] | bytearray | BaseException] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: list[Span] | bytearray | BaseException) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for path, digest in files:
                with Reader(path, digest, verify=verify) as reader:
                    wanted = choose(reader.pieces())
                    spans = sorted((s for s in wanted if s.end > s.begin), key=lambda s: s.begin)
                    put(spans)
                    for index in _blocks(spans):
                        put(reader.block(index))
                        if stop.is_set():
                            return
        except BaseException as e:
            put(e)

    def take() -> Any:
        item = ready.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def parts(spans: list[Span]) -> Iterator[Part]:
        block, current = memoryview(b""), -1
        for span in spans:
            for index in range(span.begin // BLOCK, -(-span.end // BLOCK)):
                if index != current:
                    block, current = memoryview(take()), index
                at = index * BLOCK
                begin, end = max(span.begin, at), min(span.end, at + BLOCK)
                yield span.tag, begin - span.begin, block[begin - at : end - at]

    def consume() -> Iterator[tuple[list[Span], Iterator[Part]]]:
        for _ in files:
            spans = take()
            rest = parts(spans)
            yield spans, rest
            for _ in rest:
                pass

    thread = threading.Thread(target=produce, name="checkpoint-read", daemon=True)
    thread.start()
    try:
        yield consume()
    finally:
        stop.set()
        thread.join()


def _blocks(spans: Sequence[Span]) -> Iterator[int]:
    """The blocks of ``spans``, which are in order, each once."""
    done = -1
    for span in spans:
        for index in range(max(done + 1, span.begin // BLOCK), -(-span.end // BLOCK)):
            yield index
            done = index
