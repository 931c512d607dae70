"""One owner per folder: two trainings never write into one run folder, on whatever hosts they are.

``owner.json`` in the folder says who has it: a token, and the process, host and job behind it. It needs no file locks, which
network file systems often lack: it is taken by a hard link (or an exclusive creation), and its owner touches it every few
seconds. Whoever finds one asks whether its owner lives: by the process itself on the same machine, else by watching
for ``TIMEOUT_S`` of its own clock whether the file is touched. Clocks of two machines are never compared.

Only the file decides. An owner that was silent for so long that another took its place (suspended, cut off from its disk)
finds the other's token there and must not write again: ``Owner.confirm`` before whatever another's work could be lost to.
How the file passes from one to the next is in ``dattrain.runtime.claims``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Literal

from dattrain.errors import UserError
from dattrain.runtime import claims, process
from dattrain.runtime.claims import Record, StoredRecord

NAME = "owner.json"
HEARTBEAT_S = 5.0
"""Seconds between two touches of the file by its owner."""
TIMEOUT_S = 30.0
"""Seconds without a touch after which an owner that cannot be seen otherwise is dead."""
TRAINED = "trained"
"""The purpose of a training."""

log = logging.getLogger(__name__)


class InUse(UserError):
    """Another process has the folder."""


Liveness = Literal["alive", "dead", "unknown"]


def liveness(seen: StoredRecord, here: Record) -> Liveness:
    """What this process (``here``) can tell of an owner without waiting.

    A file that was copied along with its folder owns nothing; an attempt of a job that Slurm has requeued is over, wherever
    its processes may still run.
    """
    record = seen.record
    if record.inode not in (0, seen.inode) and not _same(record.folder, here.folder):
        return "dead"
    if record.job and record.job == here.job and record.restart < here.restart:
        return "dead"
    if not record.is_of(here):
        return "unknown"
    started = process.start_time(record.pid)
    if started != record.started:
        return "unknown" if started is None and process.hidden(record.pid) else "dead"
    # Killed, it may take a while to give back a large memory. It touches nothing any more, so that ends by itself.
    return "unknown" if process.dying(record.pid) else "alive"


def current_owner(folder: Path) -> tuple[Record, Liveness] | None:
    """Who has ``folder``, as far as can be told without waiting; None where nobody has. Writes nothing.

    Raises:
        UserError: the file cannot be read.
    """
    chain = _chain(folder)
    state = liveness(chain[-1], claims.own_record(folder)) if chain else "dead"
    return None if state == "dead" else (chain[-1].record, state)


def refuse_if_in_use(folder: Path, patience_s: float = 2 * HEARTBEAT_S) -> None:
    """Return where nobody is seen to own ``folder``. Writes nothing; waits ``patience_s`` at most, and only for an owner elsewhere.

    Raises:
        InUse: naming the owner.
        UserError: the file cannot be read.
    """
    here, watch = claims.own_record(folder), _HeartbeatWatch(patience_s)
    while chain := _chain(folder):
        state = liveness(chain[-1], here)
        if state == "alive" or (state == "unknown" and watch.touched(chain[-1])):
            raise in_use(folder, chain[-1].record, here)
        if state == "dead" or watch.over:
            return
        time.sleep(watch.pause_s)


def in_use(folder: Path, record: Record, here: Record) -> InUse:
    """The error that says so, to ``here``."""
    text = f"{folder} is being {record.purpose or 'written'} by {record.who()}"
    if record.purpose == TRAINED:
        text += (
            f"; two trainings in one run folder would overwrite each other: wait for it, stop it (touch {quote(f'{folder}/stop')}; a "
            f"job: dattrain cancel {quote(str(folder))}), or choose another --run folder"
        )
    else:
        text += "; wait for it"
    if record.is_of(here) and process.suspended(record.pid):
        text += (
            f". It is suspended: let it continue (kill -CONT {record.pid}) or end it (kill -9 {record.pid})"
        )
    return InUse(text)


def acquire(
    folder: Path,
    purpose: str = TRAINED,
    *,
    heartbeat_s: float = HEARTBEAT_S,
    timeout_s: float = TIMEOUT_S,
    give_up: Callable[[], bool] = lambda: False,
) -> Owner:
    """Become the owner of ``folder``, which is made where it is not there.

    Returns at once where nobody has it, or a dead process of this machine; else after ``timeout_s`` at most. ``give_up`` is
    asked meanwhile.

    Raises:
        InUse: somebody else has it, and lives.
        KeyboardInterrupt: ``give_up`` said so.
        UserError: the folder cannot be written.
    """
    path, watch = folder / NAME, _HeartbeatWatch(timeout_s, pause_s=min(1.0, heartbeat_s / 4))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = claims.own_record(folder, purpose)
        while True:
            chain, pause_s = _chain(folder), 0.02
            if not chain:
                if claims.create(path, own):
                    break
            else:
                last = chain[-1]
                state = liveness(last, own)
                if state == "alive" or (state == "unknown" and watch.touched(last)):
                    raise in_use(folder, last.record, own)
                if state == "dead" or watch.over:
                    if claims.take_over(path, chain, own):
                        break
                else:
                    pause_s = watch.pause_s
                    if watch.first:
                        log.warning(
                            "waiting up to %.0f s: %s had %s, and may live",
                            timeout_s,
                            last.record.who(),
                            folder,
                        )
            if give_up():
                raise KeyboardInterrupt
            time.sleep(pause_s)
    except OSError as error:
        raise UserError(f"{folder}: the run folder cannot be written: {error.strerror or error}") from error
    return Owner(path, own, heartbeat_s, timeout_s)


class Owner:
    """This process's hold on a folder, from ``acquire`` to ``release``. A thread keeps touching the file."""

    def __init__(self, path: Path, record: Record, heartbeat_s: float, timeout_s: float) -> None:
        self.path, self.record = path, record
        self._heartbeat_s, self._timeout_s = heartbeat_s, timeout_s
        self._successor: Record | None = None
        self._released = False
        self._confirmed = _clock()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="owner", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether another has the folder by now. Costs nothing unless this process was silent for long."""
        if _clock() - self._confirmed > self._timeout_s / 2:
            with contextlib.suppress(OSError):
                self._look()
        return self._successor is not None

    def confirm(self) -> None:
        """Return if the folder is still this process's, by the file itself.

        Raises:
            InUse: another has it, or it was released.
            OSError: the file cannot be read.
        """
        self._look()
        if self._successor is not None and not self._successor.pid and not self.path.parent.is_dir():
            raise InUse(
                f"{self.path.parent} has not been there for more than {self._timeout_s:.0f} s: it was moved or removed, or its disk "
                "is gone; this process ends, and writes nothing more there"
            )
        if self._successor is not None:
            raise InUse(
                f"{self.path.parent}: {self._successor.who()} has taken this run folder over, since process {self.record.pid} on "
                f"{self.record.host} was silent for more than {self._timeout_s:.0f} s (suspended, or cut off from its disk); "
                "this process ends, and writes nothing more there"
            )
        if self._released:
            raise InUse(
                f"{self.path.parent}: this process has let go of the run folder, and writes nothing more there"
            )

    def release(self) -> None:
        """Let go; safe to call twice, and does nothing in a process forked from the owner."""
        if self._released or os.getpid() != self.record.pid:
            return
        self._released = True
        self._stop.set()
        # Beside a hung disk the thread may not answer; it is a daemon's.
        self._thread.join(timeout=self._timeout_s)
        with contextlib.suppress(OSError):
            claim = claims.claim_on(self.path, self.record.token)
            try:
                claimed = claims.create(claim, replace(self.record, token=secrets.token_hex(8)))
            except OSError:
                claimed = not claim.exists()  # the disk is full, for others as well
            if claimed:
                if claims.holds(self.path, self.record):
                    self.path.unlink(missing_ok=True)
                claim.unlink(missing_ok=True)

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._stop.wait(self._heartbeat_s) and self._successor is None:
            with contextlib.suppress(OSError):
                self._look()

    def _look(self) -> None:
        """Touch the file if it is ours, else remember whose it is. One that was removed, emptied or spoilt by hand is put back."""
        with self._lock:
            if self._released or self._successor is not None:
                return
            for _ in range(20):
                try:
                    # To open it is what makes NFS ask the server for the file that has this name now.
                    descriptor = os.open(self.path, os.O_RDONLY)
                except FileNotFoundError:
                    if _clock() - self._confirmed > self._timeout_s:
                        self._successor = Record("")  # one that has come and gone
                        return
                    if claims.create(self.path, self.record):
                        log.warning(
                            "%s was not there any more, and is put back; if its folder was moved, what follows is in the old place",
                            self.path,
                        )
                    continue
                with open(descriptor, "rb") as file:
                    found = claims.parse(file.read())
                    if found is not None and found.token == self.record.token:
                        self._confirmed = _clock()
                        with contextlib.suppress(OSError):
                            os.utime(descriptor)
                        return
                if found is not None:
                    self._successor = found
                    return
                time.sleep(0.05)  # created, not yet written
            chain = claims.claim_chain(self.path)
            known = _clock() - self._confirmed <= self._timeout_s and [s.record.token for s in chain] == [""]
            if not (known and claims.take_over(self.path, chain, self.record)):
                raise OSError(f"{self.path} cannot be read")


class _HeartbeatWatch:
    """Watches one file for touches, by this process's own clock and eyes: time in which it did not look counts for little."""

    def __init__(self, limit_s: float, pause_s: float = 0.5) -> None:
        self.limit_s, self.pause_s = limit_s, pause_s
        self.first = self.over = False
        """Whether the last look was the first at this owner; whether it has been silent for the limit."""
        self._last: StoredRecord | None = None
        self._silent = self._looked = 0.0

    def touched(self, seen: StoredRecord) -> bool:
        """Whether its owner has touched it since the last look."""
        now, last = time.monotonic(), self._last
        if last is None or (last.path, last.record.token) != (seen.path, seen.record.token):
            self._silent, self.first = 0.0, True
        elif last.touched != seen.touched:
            return True
        else:
            self._silent, self.first = self._silent + min(now - self._looked, 2 * self.pause_s), False
        self._last, self._looked, self.over = seen, now, self._silent >= self.limit_s
        return False


def _chain(folder: Path) -> list[StoredRecord]:
    try:
        return claims.claim_chain(folder / NAME)
    except OSError as error:
        raise UserError(
            f"{folder / NAME}: cannot be read, and so not who has the folder: {error.strerror or error}"
        ) from error


def _same(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


def _clock() -> float:
    """Seconds that go on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
