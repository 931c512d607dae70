"""Forked processes that leave alone what they inherit.

Why fork: a worker is there in milliseconds, where a spawned one imports torch for seconds; it needs nothing pickled, so
a task may be any closure over an open data set; the tables of 14 million samples are held once for all; and a script
or notebook needs no main guard. Only the forking thread lives on in the child, however, and the objects of all others are
there too: a DALI pipeline whose finaliser waits for threads that are not, a CUDA tensor, a TensorBoard writer, a file
system with its event loop. None of them may be finalised there, so

- the child's collector never looks at them (``gc.freeze``), and is off from before the fork until then. It would write to
  each, too: the pages stay shared, about 100 MB for each worker;
- the parent counts one reference more to each while it forks, which the child keeps: what the child drops or replaces (fsspec
  clears its table of file systems in a new process) does not die. Counted in the parent, for the same pages' sake;
- the child ends with ``os._exit`` after its last task, before anything that Python or a library does at exit.

Signals are held back from before the fork until the child ignores them: the parent's handlers are not its business.
Locks are the other danger. Python, glibc and OpenSSL renew their own; ``settle`` does it for fsspec; sources of ours that have
threads renew theirs. What is left is noticed as any other hang (``Workers.patience``).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing.context import ForkContext, ForkProcess
from typing import Any

from dattrain.urls import mask

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class _Process(ForkProcess):
    def run(self) -> None:
        code = 1
        try:
            super().run()
            code = 0
        except BaseException:
            print(mask(traceback.format_exc()), file=sys.stderr)
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)


class Context(ForkContext):
    """A context of multiprocessing; ``processes`` are those it made, in order. Start them under ``forking``."""

    def __init__(self) -> None:
        super().__init__()
        self.processes: list[Any] = []

    def Process(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """A process to be started, as ``multiprocessing.Process``."""
        self.processes.append(_Process(*args, **kwargs))
        return self.processes[-1]


@contextlib.contextmanager
def forking() -> Iterator[None]:
    """What is forked in here, by this thread, is safe until it calls ``settle``, which it must do."""
    collected = gc.isenabled()
    gc.disable()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        with kept(), warnings.catch_warnings(), _child_handler_kept():
            warnings.filterwarnings(
                "ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning
            )
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if collected:
            gc.enable()


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Hold one reference more to every object, and for ever in a child that is forked in here.

    There this frame stays on the stack. For workers of other libraries this alone keeps their parent's objects from being
    finalised.
    """
    objects = gc.get_objects()
    try:
        yield
    finally:
        del objects


def settle() -> None:
    """Settle a child, first of all.

    What it inherited is left alone, signals are the parent's business, and it is gone when the parent is.
    """
    gc.freeze()
    gc.enable()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, see prctl(2)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)  # it died before we asked
    signal.set_wakeup_fd(-1)  # else a signal here would wake the parent's event loop
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    if "fsspec.asyn" in sys.modules:
        # It forgets the parent's event loop by itself, but not a lock that a thread of the parent may have held.
        sys.modules["fsspec.asyn"].reset_lock()


@contextlib.contextmanager
def _child_handler_kept() -> Iterator[None]:
    """Take back the SIGCHLD handler that torch installs.

    It raises wherever the trainer happens to be, in the middle of a checkpoint too. A dead worker is noticed all the
    same, when its result is waited for.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler if handler is not None else signal.SIG_DFL)
