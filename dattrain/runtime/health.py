"""What is done about steps that are not finite and ranks that no longer answer.

``Verdicts`` is pure: it counts and decides. ``Watchdog`` watches this process from a thread of its own, and from a timer
that needs no GIL. What a decision means for the weights is the trainer's.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO

from dattrain.errors import STALLED

_NOTICE_S = 10.0
"""Between noticing a stall and ending the process: the other ranks need it to notice, and to dump their stacks."""

log = logging.getLogger(__name__)


class Verdict(Enum):
    """What follows an update."""

    GOOD = "good"
    SKIP = "skip"
    """The update was not applied; go on with the next batch."""
    ROLL_BACK = "roll back"
    """Too many in a row: restore the last checkpoint's weights, then go on past the batch."""
    STOP = "stop"
    """Rolling back did not help: end, with a bundle for debugging."""


@dataclass
class Verdicts:
    """Counts non-finite updates; all ranks are given the same flags, so all reach the same verdict.

    The counters are part of a checkpoint (``state``), so a restart does not forgive what came before it.
    """

    max_bad_steps: int
    max_rollbacks: int
    in_a_row: int = 0
    rollbacks: int = 0
    total: int = 0

    def judge(self, finite: bool) -> Verdict:
        """The verdict on one update."""
        if finite:
            self.in_a_row = 0
            return Verdict.GOOD
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row < self.max_bad_steps:
            return Verdict.SKIP
        self.in_a_row = 0
        if self.rollbacks >= self.max_rollbacks:
            return Verdict.STOP
        self.rollbacks += 1
        return Verdict.ROLL_BACK

    def state(self) -> dict[str, int]:
        """For a checkpoint's meta."""
        return {"in_a_row": self.in_a_row, "rollbacks": self.rollbacks, "total": self.total}

    def restore(self, state: dict[str, int]) -> None:
        """From a checkpoint's meta."""
        self.in_a_row, self.rollbacks, self.total = state["in_a_row"], state["rollbacks"], state["total"]


class Watchdog:
    """Ends the job when this rank has not beaten for ``limit_s`` seconds, after every rank has written down its stacks.

    Args:
        limit_s: silence that counts as a stall.
        run_dir: shared; the first rank that notices leaves ``logs/stalled.json`` there, and the others dump too.
        file: this rank's log, where stacks go.
        exit: called with ``STALLED`` in the end; tests pass their own.
    """

    def __init__(
        self,
        limit_s: float,
        run_dir: Path,
        file: IO[str],
        rank: int,
        host: str,
        exit: Callable[[int], object] = os._exit,
        notice_s: float = _NOTICE_S,
    ) -> None:
        self.limit_s, self.notice_s = limit_s, notice_s
        self._marker = run_dir / "logs" / "stalled.json"
        self._file, self._rank, self._host, self._exit = file, rank, host, exit
        self._place = "starting"
        self._beaten = time.monotonic()
        self._begun = time.time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> Watchdog:
        """Begin to watch."""
        self._thread.start()
        self._arm()
        return self

    def beat(self, place: str) -> None:
        """Say that this rank lives and what it does next (``reading data``, ``updating``, ``saving``, ...)."""
        self._place = place
        self._beaten = time.monotonic()

    def step(self) -> None:
        """At a step's edge: re-arm the timer that works even where a call into C keeps the GIL for ever."""
        self._arm()

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        faulthandler.cancel_dump_traceback_later()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=5)

    def _arm(self) -> None:
        # Later than the thread would be, which explains more.
        faulthandler.dump_traceback_later(
            self.limit_s * 1.5 + 2 * self.notice_s + 60, exit=True, file=self._file
        )

    def _watch(self) -> None:
        pause = min(1.0, self.limit_s / 10)
        while not self._stop.wait(pause):
            silent = time.monotonic() - self._beaten
            other = self._other()
            if silent > self.limit_s or other is not None:
                self._dump(silent, other)
                return

    def _other(self) -> dict[str, object] | None:
        """The marker of another rank of this attempt."""
        with contextlib.suppress(OSError, ValueError):
            if self._marker.stat().st_mtime >= self._begun - 1:
                found = json.loads(self._marker.read_text())
                return found if found.get("rank") != self._rank else None
        return None

    def _dump(self, silent: float, other: dict[str, object] | None) -> None:
        me = {"rank": self._rank, "host": self._host, "place": self._place, "silent_s": round(silent, 1)}
        if other is None:
            with contextlib.suppress(OSError):
                self._marker.parent.mkdir(parents=True, exist_ok=True)
                aside = self._marker.with_name(f".stalled.{self._rank}")
                aside.write_text(json.dumps(me))
                os.replace(aside, self._marker)
        first = me if other is None else other
        reason = (
            f"stalled: rank {first['rank']} on {first['host']} was silent for {first['silent_s']} s in "
            f"{first['place']!r} (train.health.stall_seconds={self.limit_s:g}); rank {self._rank} was in "
            f"{self._place!r} for {silent:.0f} s; stacks of every rank are in logs/rank_N.log"
        )
        log.error(reason)
        print(f"dattrain: {reason}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError, ValueError):
            faulthandler.dump_traceback(self._file, all_threads=True)
            self._file.flush()
        time.sleep(self.notice_s)
        self._exit(STALLED)
