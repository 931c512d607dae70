"""What each worker process is at, in memory that it shares with its parent: a worker that hangs cannot be asked."""

from __future__ import annotations

import mmap
import struct
import time
from dataclasses import dataclass

_HEAD = struct.Struct("=qd?H")
_ROW = 512
_own_row: tuple[ProgressTable, int] | None = None


@dataclass(frozen=True)
class WorkerProgress:
    """What one worker is at: the last task, whether it is done, seconds since it was begun or done, and where in it."""

    number: int
    busy: bool
    seconds: float
    where: str


class ProgressTable:
    """Rows of ``workers`` processes, which must be forked after this is made. Each writes its own, the parent reads."""

    def __init__(self, workers: int) -> None:
        self._memory = mmap.mmap(-1, max(1, workers) * _ROW)
        for worker in range(workers):
            self._write(worker, -1, False)

    def join(self, worker: int) -> None:
        """This process is that worker from now on: ``note`` writes its row."""
        global _own_row
        _own_row = self, worker

    def begin(self, number: int) -> None:
        """This worker begins a task."""
        if _own_row is not None:
            self._write(_own_row[1], number, True)

    def end(self, number: int) -> None:
        """This worker is done with a task."""
        if _own_row is not None:
            self._write(_own_row[1], number, False)

    def row(self, worker: int) -> WorkerProgress:
        """What a worker wrote last."""
        at = worker * _ROW
        number, since, busy, length = _HEAD.unpack_from(self._memory, at)
        text = self._memory[at + _HEAD.size : at + _HEAD.size + length].decode(errors="replace")
        return WorkerProgress(number, busy, time.monotonic() - since, text)

    def _write(self, worker: int, number: int, busy: bool) -> None:
        # CLOCK_MONOTONIC is one clock for all processes of a machine.
        _HEAD.pack_into(self._memory, worker * _ROW, number, time.monotonic(), busy, 0)

    def _note(self, worker: int, text: str) -> None:
        # The end of a path says more than its beginning.
        content = text.encode(errors="replace")[-(_ROW - _HEAD.size) :]
        at = worker * _ROW
        self._memory[at + _HEAD.size : at + _HEAD.size + len(content)] = content
        struct.pack_into("=H", self._memory, at + _HEAD.size - 2, len(content))


def note(text: str) -> None:
    """Say which file or sample this worker turns to; nothing in a process that is no worker."""
    if _own_row is not None:
        _own_row[0]._note(_own_row[1], text)
