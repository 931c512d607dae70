"""The rank files of a checkpoint, each sent from its one reader to every rank.

Where all ranks want something of all files (another world, another stage), a thousand of them opening a thousand files each is
what a file system does not survive. Here each file is opened and read once, by one rank, checked there, and broadcast; the
readers are spread over the ranks and prefetch all at the same time. The price is that each rank receives all of
what is wanted anywhere, one piece of at most ``CHUNK`` bytes after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from dattrain.errors import Damaged
from dattrain.runtime import collectives
from dattrain.state.format.prefetch import Part, Span, prefetch
from dattrain.state.format.rank_file import CHUNK, Digest, Pieces


def relay(
    files: Sequence[tuple[Path, Digest]],
    numbers: Mapping[tuple[str, str], int],
    wanted: np.ndarray,
    *,
    verify: bool = True,
) -> Iterator[tuple[np.ndarray, Iterator[tuple[int, memoryview]]]]:
    """The wanted pieces of every file, on every rank. Collective: each rank must use up all of it, whatever it does with it.

    Args:
        files: the same on every rank.
        numbers: of (state, name), the same on every rank.
        wanted: bool by number, the same on every rank.

    Yields, for every file in its turn, the table of its pieces, int64 ``(pieces, 3)``: number, first element, elements; and
    an iterator over (first byte, bytes) of their fp32 data, end to end. The bytes are overwritten by the next ones.

    Raises:
        Damaged: a file is not as it was written; on every rank, in the words of the one that read it.
    """
    rank, world = collectives.rank_and_world()
    readers = [i * world // len(files) for i in range(len(files))]
    local_files = [file for file, reader in zip(files, readers) if reader == rank]

    def choose(pieces: Pieces) -> list[Span]:
        spans = []
        for key, found in pieces.items():
            number = numbers.get(key, -1)
            for piece, begin in found if number >= 0 and wanted[number] else ():
                if piece.dtype != "F32":
                    raise Damaged(f"{piece.state} of {piece.name} is there as {piece.dtype}, not F32")
                spans.append(Span(begin, begin + piece.nbytes, (number, piece.start, piece.numel)))
        return spans

    channel = _Channel()
    with prefetch(local_files, choose, verify=verify) as found:
        sender = _Sender(found)
        for reader in readers:
            count = int.from_bytes(channel.send(8, reader, sender.count), "little")
            table = np.frombuffer(bytes(channel.send(24 * count, reader, sender.table)), np.int64).reshape(
                -1, 3
            )
            yield table, _chunks(channel, reader, 4 * int(table[:, 2].sum()), sender)


def _chunks(channel: _Channel, reader: int, size: int, sender: _Sender) -> Iterator[tuple[int, memoryview]]:
    for begin in range(0, size, CHUNK):
        yield begin, channel.send(min(CHUNK, size - begin), reader, sender.data)


class _Sender:
    """What a reader puts into its messages, file after file; each method fills the view that it is given."""

    def __init__(self, found: Iterator[tuple[list[Span], Iterator[Part]]]) -> None:
        self._found = found
        self._rows: list[tuple[int, int, int]] = []
        self._parts: Iterator[Part] = iter(())
        self._rest = memoryview(b"")

    def count(self, view: memoryview) -> None:
        """Advance to the next file: the number of its pieces."""
        spans, self._parts = next(self._found)
        self._rows = [span.tag for span in spans]
        view[:] = len(self._rows).to_bytes(8, "little")

    def table(self, view: memoryview) -> None:
        """The table of its pieces."""
        view[:] = np.array(self._rows, np.int64).tobytes()

    def data(self, view: memoryview) -> None:
        """The next bytes of its pieces."""
        at = 0
        while at < len(view):
            if not self._rest:
                self._rest = next(self._parts)[2]
            count = min(len(self._rest), len(view) - at)
            view[at : at + count] = self._rest[:count]
            self._rest, at = self._rest[count:], at + count


class _Channel:
    """Messages whose size every rank knows, each with a byte that says whether its sender failed; one buffer for all."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._rank = collectives.rank_and_world()[0]

    def send(self, size: int, source: int, fill: Callable[[memoryview], None]) -> memoryview:
        """The ``size`` bytes that ``fill`` leaves on rank ``source``, until the next message. Raises what it does, everywhere."""
        if not size:
            return memoryview(b"")
        if self._buffer.numel() < size + 1:
            self._buffer = torch.empty(size + 1, dtype=torch.uint8)
        message = self._buffer[: size + 1]
        view = message.numpy().data
        failure: Exception | None = None
        if self._rank == source:
            view[size] = 0
            try:
                fill(view[:size])
            except Exception as e:
                failure, view[size] = e, 1
        collectives.broadcast_tensor(message, source)
        if view[size]:
            collectives.raise_from(source, failure)
        return view[:size]
