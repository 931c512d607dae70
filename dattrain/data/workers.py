"""Processes that work on numbered tasks: decoding micro-batches in training, whole shards in packing and checking.

torch's ``DataLoader`` runs them, keeps the results in order, and notices one that dies. What it is given is a map from
a number to a result, so a process needs no state but what it inherits by forking.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from dattrain.errors import UserError

T = TypeVar("T")


class _Failure:
    """A UserError on its way out of a worker; torch would wrap an exception's text in a traceback."""

    def __init__(self, error: UserError) -> None:
        self.message, self.exit_code = str(error), error.exit_code


class _Task(TorchDataset):
    def __init__(self, function: Callable[[int], Any]) -> None:
        self.function = function

    def __getitem__(self, number: int) -> Any:
        try:
            return self.function(number)
        except UserError as error:
            return _Failure(error)


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

    Args:
        count: of the results; None is without end.
        workers: processes; 0 works in this one, when asked for the next.
        prefetch: results that each process holds ready.
        pin: whether results are moved to page-locked memory (their ``pin_memory`` is called).
        in_order: False yields a result as soon as it is there.

    Raises:
        UserError: from ``__next__``, where the function raised it; the processes are ended then.
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
    ) -> None:
        before = set(multiprocessing.active_children())
        with warnings.catch_warnings(), _child_handler_kept():
            # Whether the processes are too many for the cores is measured (the share of data-wait), not guessed.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader: DataLoader[Any] = DataLoader(
                _Task(function),
                batch_size=None,
                sampler=_From(count),
                num_workers=workers,
                prefetch_factor=prefetch if workers else None,
                collate_fn=_as_it_is,
                worker_init_fn=_start_worker if workers else None,
                multiprocessing_context="fork" if workers else None,
                pin_memory=pin,
                in_order=in_order,
                # Without one of its own the loader would draw from, and so move, torch's global generator.
                generator=torch.Generator(),
            )
            self._pool = _Pool(iter(loader))
        self._pool.processes = [p for p in multiprocessing.active_children() if p not in before]
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
        try:
            result = next(self._pool.iterator)
        except (RuntimeError, OSError, EOFError) as error:
            if not self._pool.broken():
                raise
            self.close()
            raise UserError(
                f"a data worker died ({error}); most often the machine's memory, or /dev/shm, was full: "
                "lower data.workers or data.prefetch"
            ) from error
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


class _Pool:
    """What must be let go of when a ``Workers`` is no more."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self.iterator: Iterator[Any] | None = iterator
        self.processes: list[Any] = []

    def broken(self) -> bool:
        """Whether a process died; one that just did may need a moment to be seen."""
        for process in self.processes:
            process.join(0.1)
        return any(process.exitcode not in (None, 0) for process in self.processes)

    def close(self) -> None:
        # Letting go of torch's iterator asks its workers to end, after the task at hand.
        self.iterator = None
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


@contextmanager
def _child_handler_kept() -> Iterator[None]:
    """Take back the SIGCHLD handler that torch installs: it raises wherever the trainer happens to be, in the middle
    of a checkpoint too. A dead worker is noticed all the same, when its result is waited for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler if handler is not None else signal.SIG_DFL)


def _as_it_is(result: Any) -> Any:
    return result


def _start_worker(_: int) -> None:
    """Settings of a worker process: one thread; signals are the trainer's business; gone when the trainer is."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, see prctl(2)
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)  # it died before we asked
    torch.set_num_threads(1)
