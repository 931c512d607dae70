"""Processes that work on numbered tasks: decoding micro-batches in training, whole shards in packing and checking.

torch's ``DataLoader`` runs them, keeps the results in order, and notices one that dies. What it is given is a map from
a number to a result, so a process needs no state but what it inherits by forking (``fork`` says what that takes). One
that lives and gives nothing is noticed here.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from dattrain.clock import Stopwatch
from dattrain.data.fork import Context, forking, settle
from dattrain.data.worker_progress import ProgressTable
from dattrain.errors import STALLED, UserError

T = TypeVar("T")

_LOOK_S = 5.0
"""Between looks at what the workers are at, while one is waited for."""
_REMIND_S = 300.0
"""Between warnings that a result is still waited for."""

log = logging.getLogger(__name__)


class _Failure:
    """A UserError on its way out of a worker; torch would wrap an exception's text in a traceback."""

    def __init__(self, error: UserError) -> None:
        self.message, self.exit_code = str(error), error.exit_code


class _Task(TorchDataset[Any]):
    def __init__(self, function: Callable[[int], Any], progress: ProgressTable) -> None:
        self.function = function
        self.progress = progress

    def __getitem__(self, number: int) -> Any:
        self.progress.begin(number)
        try:
            return self.function(number)
        except UserError as error:
            return _Failure(error)
        finally:
            self.progress.end(number)


class _From(Sampler[int]):
    """Numbers from 0 on, ``count`` of them or without end."""

    def __init__(self, count: int | None) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        number = 0
        while self.count is None or number < self.count:
            yield number
            number += 1


class Workers(Generic[T]):
    """Iterator of ``function(0), function(1), ...`` from forked processes.

    The processes end with the thread that made this, if not before.

    Args:
        count: of the results; None is without end.
        workers: processes; 0 works in this one, when asked for the next.
        prefetch: results that each process holds ready.
        pin: whether results are moved to page-locked memory (their ``pin_memory`` is called).
        in_order: False yields a result as soon as it is there.
        patience: seconds that a result may be waited for; None waits on, and says so now and then.
        unit: what a number counts, for messages.

    Raises:
        UserError: from ``__next__``, where the function raised it, a process died, or one gave nothing for ``patience``
            seconds; the processes are ended then.
    """

    def __init__(
        self,
        function: Callable[[int], T],
        *,
        count: int | None,
        workers: int,
        prefetch: int = 2,
        pin: bool = False,
        in_order: bool = True,
        patience: float | None = None,
        unit: str = "task",
    ) -> None:
        self.patience, self.unit = patience, unit
        self._in_order = in_order
        self._served = 0
        self._progress = ProgressTable(workers)
        context = Context() if workers else None
        with warnings.catch_warnings(), forking() if workers else contextlib.nullcontext():
            # Whether the processes are too many for the cores is measured (the share of data-wait), not guessed.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader: DataLoader[Any] = DataLoader(
                _Task(function, self._progress),
                batch_size=None,
                sampler=_From(count),
                num_workers=workers,
                prefetch_factor=prefetch if workers else None,
                collate_fn=_as_it_is,
                worker_init_fn=partial(_start_worker, self._progress) if workers else None,
                multiprocessing_context=context,
                pin_memory=pin,
                in_order=in_order,
                timeout=min(_LOOK_S, (patience or _REMIND_S) / 4) if workers else 0,
                # Without one of its own the loader would draw from, and so move, torch's global generator.
                generator=torch.Generator(),
            )
            self._pool = _Pool(iter(loader), context.processes if context else [])
        # At exit multiprocessing would wait for ever for workers that ignore its SIGTERM; this runs before it does.
        self._end = weakref.finalize(self, self._pool.close)

    @property
    def processes(self) -> list[Any]:
        """The worker processes."""
        return self._pool.processes

    def __iter__(self) -> Workers[T]:
        return self

    def __next__(self) -> T:
        if self._pool.iterator is None:
            raise StopIteration
        waited, reminded = Stopwatch(2 * _LOOK_S), 0.0
        while True:
            try:
                result: T | _Failure = next(self._pool.iterator)
                break
            except (RuntimeError, OSError, EOFError) as error:
                if not _timed_out(error):
                    if not self._pool.broken():
                        raise
                    self._pool.end()
                    self.close()
                    raise UserError(
                        f"a data worker died ({error}); most often the machine's memory, or /dev/shm, was full: "
                        "lower data.workers or data.prefetch"
                    ) from error
            now = waited.look()
            if self.patience is not None and now > self.patience:
                self._give_up(now)
            if now - reminded > _REMIND_S:
                reminded = now
                log.warning("waited %.0f s for data: %s", now, self._at_fault()[1])
        self._served += 1
        if isinstance(result, _Failure):
            self.close()
            raise UserError(result.message, exit_code=result.exit_code)
        return result

    def __enter__(self) -> Workers[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; returns when they are gone."""
        self._end()

    def _give_up(self, waited: float) -> None:
        worker, account = self._at_fault()
        self._pool.kill(worker)
        self.close()
        stack = "; its stack is in this rank's log" if faulthandler.is_enabled() else ""
        raise UserError(
            f"a data worker gives nothing: {account}. It was waited for {waited:.0f} s{stack}. Most often a file system or "
            "a server no longer answers. If that is how long reading takes here, raise train.health.stall_seconds",
            exit_code=STALLED,
        )

    def _at_fault(self) -> tuple[int, str]:
        """The worker that is waited for, as far as can be told, and what it is at."""
        rows = [self._progress.row(worker) for worker in range(len(self.processes))]
        at = [w for w, row in enumerate(rows) if self._in_order and row.busy and row.number == self._served]
        # Nobody is at it: then a worker does not even take it, most likely the one that was heard of longest ago.
        worker = at[0] if at else max(range(len(rows)), key=lambda w: rows[w].seconds)
        row, pid = rows[worker], self.processes[worker].pid
        where = f" ({row.where})" if row.where else ""
        if row.number < 0:
            doing = f"has not begun any {self.unit} in {row.seconds:.0f} s"
        elif row.busy:
            doing = f"has been at {self.unit} {row.number}{where} for {row.seconds:.0f} s"
        else:
            doing = f"was done with {self.unit} {row.number} ({row.seconds:.0f} s ago) and has begun no other"
        return worker, f"process {pid} (worker {worker}, state {_state(pid)}) {doing}"


class _Pool:
    """What must be let go of when a ``Workers`` is no more."""

    def __init__(self, iterator: Iterator[Any], processes: list[Any]) -> None:
        self.iterator: Iterator[Any] | None = iterator
        self.processes = processes

    def broken(self) -> bool:
        """Whether a process died; one that just did may need a moment to be seen."""
        for process in self.processes:
            process.join(0.1)
        return any(process.exitcode not in (None, 0) for process in self.processes)

    def kill(self, worker: int) -> None:
        """End all at once; the one at fault writes its stack down before, if it still can."""
        if faulthandler.is_enabled():
            with _deaths_unheard():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.processes[worker].pid, signal.SIGABRT)
                    # One that is stopped would not see it.
                    os.kill(self.processes[worker].pid, signal.SIGCONT)
                self.processes[worker].join(1)
        self.end()

    def end(self) -> None:
        """Kill all. Where an error of torch's iterator is being handled, letting go of it would ask nobody to end."""
        with _deaths_unheard():
            for process in self.processes:
                process.kill()
            for process in self.processes:
                process.join(10)

    def close(self) -> None:
        # Letting go of torch's iterator asks its workers to end, after the task at hand.
        self.iterator = None
        until = time.monotonic() + 10
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                with _deaths_unheard():
                    process.kill()
                    process.join()


@contextlib.contextmanager
def _deaths_unheard() -> Iterator[None]:
    """Keep torch's handler of SIGCHLD from raising an error for a worker that we end ourselves.

    Any DataLoader of this process may have installed it.
    """
    before = signal.getsignal(signal.SIGCHLD)
    # Handlers run in the main thread, and can be changed there alone; what is no function of Python's raises nothing.
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _timed_out(error: BaseException) -> bool:
    # torch has no class for it. An error of a worker begins with "Caught".
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader timed out")


def _state(pid: int) -> str:
    """The state of a process as the kernel sees it: ``T (stopped)``, ``D (disk sleep)``."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("State:"):
                return line.partition(":")[2].strip()
    return "unknown"


def _as_it_is(result: Any) -> Any:
    return result


def _start_worker(progress: ProgressTable, worker: int) -> None:
    """Settings of a worker process: its own row on the table; one thread."""
    settle()
    progress.join(worker)
    torch.set_num_threads(1)
