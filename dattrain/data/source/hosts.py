"""What servers asked of us: to be left alone for a while.

Facts of the machine at the other end, so one table serves every ``Transfer`` of a process, all its threads, and the
workers that are forked from it.
"""

from __future__ import annotations

import mmap
import random
import struct
import time
import zlib
from collections.abc import Callable

from dattrain.data.worker_progress import note

_ROW = struct.Struct("=d?")
_ROWS = 256


class Hosts:
    """By server (``dattrain.urls.server``): when it may be asked again, and whether it was said that it knows no ranges.

    The table is memory that forked processes share, without a lock, which one of them could find held; the worst that a race
    does is one request or one warning more, and two servers in one row wait for each other.

    Args:
        clock: seconds, the same in all processes of the machine.
        sleep: waits for seconds.
        wall: seconds since 1970.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.clock, self.sleep, self.wall = clock, sleep, wall
        self._table = mmap.mmap(-1, _ROWS * _ROW.size)
        # A generator of its own: the global one belongs to the user.
        self.jitter = random.Random()

    def hold(self, server: str, seconds: float) -> bool:
        """Nobody asks it for so long; whether that is news."""
        until, known = self.clock() + seconds, self._row(server)
        self._write(server, max(until, known[0]), known[1])
        return until > known[0] + 1.0

    def wait(self, server: str) -> None:
        """Return when it may be asked: at once where nothing is known of it."""
        waited = 0.0
        while (until := self._row(server)[0]) != waited and (left := until - self.clock()) > 0:
            note(f"waits {left:.0f} s for {server}, as that asked")
            # Not all at the same instant: those who were refused together would be again.
            self.sleep(left + self.jitter.uniform(0.0, min(5.0, 0.1 * left)))
            waited = until  # another may have been told to wait longer meanwhile

    def lacks_ranges(self, server: str) -> bool:
        """It knows no ranges; whether that is news."""
        until, known = self._row(server)
        self._write(server, until, True)
        return not known

    def _row(self, server: str) -> tuple[float, bool]:
        return _ROW.unpack_from(self._table, _place(server))

    def _write(self, server: str, until: float, ranges: bool) -> None:
        _ROW.pack_into(self._table, _place(server), until, ranges)


def _place(server: str) -> int:
    return zlib.crc32(server.encode()) % _ROWS * _ROW.size


HOSTS = Hosts()
"""The table of this process and those forked from it."""
