"""When the next log line of a training is due: after so many updates, or after so much time."""

from __future__ import annotations

import time
from collections.abc import Callable

from dattrain.config.values import seconds


class LogInterval:
    """Of ``train.log_every``.

    Args:
        every: updates, or time as ``30s``.
        first: whether this is rank 0, by whose clock time passes.
        clock: seconds.
    """

    def __init__(self, every: int | str, *, first: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._every, self._first, self._clock = every, first, clock
        self._last = clock()

    def due(self, step: int) -> bool:
        """Whether update ``step`` has a line: by time on rank 0 alone, whose word the others take."""
        if isinstance(self._every, int):
            return step % self._every == 0
        return self._first and self._clock() - self._last >= seconds(self._every)

    def logged(self) -> None:
        """Time counts from now on."""
        self._last = self._clock()
