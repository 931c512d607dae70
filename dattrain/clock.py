"""Time as a process lives it, without what it slept through (a suspended job, SIGSTOP, a laptop's lid); and as text."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Stopwatch:
    """Seconds since ``reset``, for one who looks often. Threads may share it.

    Args:
        look_s: most that one look counts. What lies longer before it, this process was kept from.
        clock: seconds.
    """

    def __init__(self, look_s: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._look_s, self._clock = look_s, clock
        self._lock = threading.Lock()
        self._looked = clock()
        self._seconds = self._paused = 0.0

    def look(self) -> float:
        """Seconds so far."""
        with self._lock:
            return self._look()

    def reset(self) -> None:
        """Begin anew."""
        with self._lock:
            self._look()
            self._seconds = 0.0

    def pauses(self) -> float:
        """Seconds that did not count, since this was last asked."""
        with self._lock:
            self._look()
            paused, self._paused = self._paused, 0.0
            return paused

    def _look(self) -> float:
        now = self._clock()
        gap, self._looked = now - self._looked, now
        self._seconds += min(gap, self._look_s)
        self._paused += max(gap - self._look_s, 0.0)
        return self._seconds


def duration(seconds: float) -> str:
    """``2d 03:04``, ``3:04:05`` or ``4:05``."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02}:{m:02}"
    return f"{h}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
