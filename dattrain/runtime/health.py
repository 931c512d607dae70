"""What is done about steps that are not finite and ranks that no longer answer.

``NonFinitePolicy`` is pure: it counts and decides. ``Watchdog`` watches this process from a thread of its own, and from a process
that needs no GIL of it. What a decision means for the weights is the trainer's.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO

from dattrain.clock import Stopwatch
from dattrain.errors import STALLED
from dattrain.files import reason, write_atomically

GRACE_S = 10.0
"""Between noticing a stall and ending the process: the other ranks need it to notice, and to dump their stacks."""

_TICK_S = 5.0
"""Most that one look at the clock counts as silence. The thread looks every second, with a thousand ranks every four; what is much
later, it was kept from."""

_LOOKS = 256.0
"""Looks at the shared folder in a second, by all ranks together, that are not worth sparing."""

log = logging.getLogger(__name__)


def pause(world: int, limit_s: float, notice_s: float) -> float:
    """Seconds between two looks of each of ``world`` ranks: seldom enough for the file system, and often enough for ``notice_s``."""
    return min(max(1.0, min(world / _LOOKS, 0.4 * notice_s)), limit_s / 10)


class Action(Enum):
    """What follows an update."""

    NONE = "none"
    """It was finite."""
    SKIP = "skip"
    """The update was not applied; train on with the next batch."""
    ROLL_BACK = "roll back"
    """Too many in a row: restore the last checkpoint's weights, then train on past the batch."""
    STOP = "stop"
    """Rolling back did not help: end, with a debug dump."""


@dataclass(frozen=True)
class Decision:
    """What is done about one update."""

    action: Action
    in_a_row: int
    """Non-finite updates in a row, this one counted."""


@dataclass
class NonFinitePolicy:
    """Counts non-finite updates; all ranks are given the same flags, so all come to the same decision.

    The counters are part of a checkpoint (``state``), so a restart does not forgive what came before it.
    """

    max_bad_steps: int
    max_rollbacks: int
    in_a_row: int = 0
    """Non-finite updates since the last finite one or rollback."""
    rollbacks: int = 0
    total: int = 0

    def decide(self, finite: bool) -> Decision:
        """Count one update; what to do about it."""
        if finite:
            self.in_a_row = 0
            return Decision(Action.NONE, 0)
        self.total += 1
        self.in_a_row += 1
        in_a_row = self.in_a_row
        if in_a_row < self.max_bad_steps:
            return Decision(Action.SKIP, in_a_row)
        self.in_a_row = 0
        if self.rollbacks >= self.max_rollbacks:
            return Decision(Action.STOP, in_a_row)
        self.rollbacks += 1
        return Decision(Action.ROLL_BACK, in_a_row)

    def state(self) -> dict[str, int]:
        """The counters, for a checkpoint's meta."""
        return {"in_a_row": self.in_a_row, "rollbacks": self.rollbacks, "total": self.total}

    def restore(self, state: dict[str, int]) -> None:
        """Take the counters of a checkpoint's meta."""
        self.in_a_row, self.rollbacks, self.total = state["in_a_row"], state["rollbacks"], state["total"]


class Watchdog:
    """Ends the job when this rank has not beaten for ``limit_s`` seconds, after every rank has written down its stacks.

    Time in which this process did not run at all (a suspended job, SIGSTOP, a laptop's lid) is nobody's silence: each look at the
    clock counts no more than ``_TICK_S``. A call into C that keeps the GIL for ever stops the thread that looks; a process of
    its own, a few MB of bare Python, watches for that, and counts neither while it is stopped nor while this process is.

    Args:
        limit_s: silence that counts as a stall.
        run_dir: shared; the first rank that notices leaves ``logs/stalled.json`` there, and the others dump too.
        file: this rank's log, where stacks go.
        world: ranks; the more there are, the less often each looks for the others' marker, on a file system that all share.
        exit: called with ``STALLED`` in the end; tests pass their own.
    """

    def __init__(
        self,
        limit_s: float,
        run_dir: Path,
        file: IO[str],
        rank: int,
        host: str,
        world: int = 1,
        exit: Callable[[int], object] = os._exit,
        notice_s: float = GRACE_S,
    ) -> None:
        self.limit_s, self.notice_s = limit_s, notice_s
        self.attempt: str | None = None
        """What all ranks of this attempt share and no other attempt has; without it no other rank's marker is believed."""
        self._pause = pause(world, limit_s, notice_s)
        self._marker = run_dir / "logs" / "stalled.json"
        self._file, self._rank, self._host, self._exit = file, rank, host, exit
        self._place = "starting"
        self._silence = Stopwatch(_TICK_S)
        self._helper: subprocess.Popen[bytes] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self, grace_s: float = 60.0) -> Watchdog:
        """Begin to watch. The process beside this one has ``grace_s`` more patience than the thread, which explains more."""
        self._thread.start()
        limit = self.limit_s * 1.5 + 2 * self.notice_s + grace_s
        self._helper = _start_helper(
            limit, self._marker, self._status(limit) | {"place": "a call that keeps the GIL"}
        )
        return self

    def beat(self, place: str) -> None:
        """Say that this rank lives and what it does next (``reading data``, ``updating``, ``saving``, ...)."""
        self._place = place
        self._silence.reset()
        if self._helper is not None and self._helper.stdin is not None:
            with contextlib.suppress(OSError, ValueError):  # full: it is stopped; closed: at the end
                os.write(self._helper.stdin.fileno(), b".")

    def pauses(self) -> float:
        """Seconds that this process was not running since this was last asked."""
        return self._silence.pauses()

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        if self._helper is not None and self._helper.stdin is not None:
            self._helper.stdin.close()
            self._helper.wait()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=5)

    def _watch(self) -> None:
        while not self._stop.wait(self._pause):
            silent = self._silence.look()
            other = self._other()
            if silent > self.limit_s or other is not None:
                self._dump(silent, other)
                return

    def _other(self) -> dict[str, object] | None:
        """The marker of another rank of this attempt."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self._marker.read_text())
            if self.attempt is not None and found.get("attempt") == self.attempt:
                return found if found.get("rank") != self._rank else None
        return None

    def _status(self, silent: float) -> dict[str, object]:
        return {
            "rank": self._rank, "host": self._host, "place": self._place, "silent_s": round(silent, 1),
            "attempt": self.attempt,
        }  # fmt: skip

    def _dump(self, silent: float, other: dict[str, object] | None) -> None:
        me = self._status(silent)
        if other is None:
            with contextlib.suppress(OSError):
                self._marker.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self._marker, json.dumps(me))
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


_HELPER = """
import json, os, resource, select, signal, sys, time
parent, limit, look, marker, me = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), sys.argv[4], sys.argv[5]
silent, looked = 0.0, time.monotonic()
while silent < limit:
    ready = select.select([0], [], [], min(1.0, limit / 10))[0]
    if os.getppid() != parent:
        sys.exit(0)
    now = time.monotonic()
    try:
        state = open("/proc/%d/stat" % parent).read().rpartition(")")[2].split()[0]
    except OSError:
        state = "R"
    silent, looked = silent + (0 if state in "Tt" else min(now - looked, look)), now
    if ready:
        if not os.read(0, 65536):
            sys.exit(0)
        silent = 0.0
sys.stderr.write("dattrain: stalled: a call into C keeps the GIL; this process ends\\n")
try:
    tmp_path = "%s.%d" % (marker, parent)
    with open(tmp_path, "w") as file:
        file.write(me)
    os.replace(tmp_path, marker)
    resource.prlimit(parent, resource.RLIMIT_CORE, (0, 0))
except OSError:
    pass
try:
    os.kill(parent, signal.SIGABRT)
    time.sleep(10)
    os.kill(parent, signal.SIGKILL)
except OSError:
    pass
"""
"""Its input has a byte for each beat, and ends with the process that it watches, or with what that has forked: so its parent counts,
whose number may be another's by then. SIGABRT makes faulthandler write the stacks,
for which it needs no GIL."""


def _start_helper(limit_s: float, marker: Path, me: dict[str, object]) -> subprocess.Popen[bytes] | None:
    # What Slurm sends to all processes of a step, and Ctrl-C, must not end it: it inherits the mask.
    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        words = [str(os.getpid()), str(limit_s), str(_TICK_S), str(marker), json.dumps(me)]
        helper = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _HELPER, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
    except OSError as error:
        log.warning("no process watches for calls that keep the GIL: %s (%s)", sys.executable, reason(error))
        return None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert helper.stdin is not None
    os.set_blocking(helper.stdin.fileno(), False)
    return helper
