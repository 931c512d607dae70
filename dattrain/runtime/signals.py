"""Signals only set a flag; at a step boundary all ranks agree on it. The stop file does the same by hand.

A handler could not save by itself: all ranks have to, and a signal may reach one rank only (submitit signals rank 0
alone). So the handler remembers, the trainer's all-reduce of each step tells the others, and all ranks save together.
"""

from __future__ import annotations

import os
import signal
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""A library that takes SIGUSR1 for itself (NCCL may) installs a handler over ours."""
STOP_FILE = "stop"


class StopRequest(IntEnum):
    """What was asked for; the larger one wins when ranks disagree."""

    NONE = 0
    PREEMPT = 1
    """Save, then be started again."""
    STOP = 2
    """Save, then end for good, by hand: the stop file or Ctrl-C."""


class Preemption:
    """Catches ``SIGTERM``, ``SIGUSR1`` and ``SIGUSR2`` (preempted) and ``SIGINT`` (stop) between ``install`` and ``restore``.

    A second Ctrl-C interrupts at once. Processes forked from this one (data workers) inherit the handlers and ignore
    the signals: it is this process that ends them. What was installed before is back after ``restore``.
    """

    def __init__(self, run_dir: Path) -> None:
        self.received: int | None = None
        """The last signal that was caught."""
        self._stop_file = run_dir / STOP_FILE
        self._pid = os.getpid()
        self._interrupted = False
        self._previous: dict[int, Any] = {}

    def install(self) -> Preemption:
        """Install the handlers; only possible in the main thread."""
        for signum in (*SIGNALS, signal.SIGINT):
            self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()

    def request(self, look_for_file: bool = True) -> StopRequest:
        """What this rank has been asked for. One rank is enough to look for the stop file."""
        if self._interrupted or (look_for_file and self._stop_file.exists()):
            return StopRequest.STOP
        return StopRequest.NONE if self.received is None else StopRequest.PREEMPT

    def why(self, look_for_file: bool = True) -> str:
        """What this rank's request came from: a signal or the file; empty where there is none."""
        if self._interrupted:
            return "Ctrl-C (SIGINT)"
        if look_for_file and self._stop_file.exists():
            return f"the file {self._stop_file}"
        return "" if self.received is None else signal.Signals(self.received).name

    def clear_stop_file(self) -> None:
        """Remove the stop file, so that the next start trains."""
        self._stop_file.unlink(missing_ok=True)

    def clear_old_stop_file(self, began: float) -> bool:
        """Remove a stop file that was there before ``began`` (``time.time``): it was meant for an earlier start. Whether there was one."""
        try:
            old = self._stop_file.stat().st_mtime < began
        except OSError:
            return False
        if old:
            self.clear_stop_file()
        return old

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return
        if signum == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            os.write(2, b"\nstopping after this step and a save; press Ctrl-C again to stop at once\n")
        else:
            self.received = signum
