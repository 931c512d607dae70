"""What servers asked of this process: to be left alone for a while. Facts of the machine at the other end, so one table serves
every ``Transfer`` of the process, and all its threads wait alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from dattrain.data.board import note


class Hosts:
    """By server (``dattrain.urls.server``): when it may be asked again, and what was said of it already.

    Plain dictionaries without a lock, which a forked worker could find held; the worst that a race does is one request more.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.clock, self.sleep, self.wall = clock, sleep, wall
        self._until: dict[str, float] = {}
        self._said: set[tuple[str, str]] = set()
        # A generator of its own: the global one belongs to the user.
        self.jitter = random.Random()

    def hold(self, server: str, seconds: float) -> bool:
        """Nobody asks it for so long; whether that is news."""
        until = self.clock() + seconds
        news = until > self._until.get(server, 0.0) + 1.0
        self._until[server] = max(until, self._until.get(server, 0.0))
        return news

    def wait(self, server: str) -> None:
        """Return when it may be asked: at once where nothing is known of it."""
        while (left := self._until.get(server, 0.0) - self.clock()) > 0:
            note(f"waits {left:.0f} s for {server}, as that asked")
            # Not all at the same instant: those who were refused together would be again.
            self.sleep(left + self.jitter.uniform(0.0, min(5.0, 0.1 * left)))

    def first(self, server: str, what: str) -> bool:
        """Whether this is the first time that ``what`` is said of a server."""
        if (server, what) in self._said:
            return False
        self._said.add((server, what))
        return True


HOSTS = Hosts()
"""Of this process."""
