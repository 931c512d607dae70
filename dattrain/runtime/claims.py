"""A file that says who has a folder, created and handed over so that one process alone gets it; on whatever file system.

All that changes it is ``create`` (a hard link, or where there are none an exclusive creation: never a file lock, which network
file systems often lack) and renames. The file that holds token D is replaced, or removed by D itself, by nobody but the holder of
the *claim* on D, a second file that is created in the same way: so of two that find D dead one wins. The claim then takes
the file's name, and its holder reads back what has that name now. A claim whose holder has died is claimed in turn, and
renamed over that one; if its holder was not dead after all, what it renames by its claim's name is the newcomer's.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import re
import secrets
import shlex
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from dattrain.runtime import process
from dattrain.urls import mask

_TOKEN = re.compile(r"\w{1,64}", re.ASCII)
"""What a token looks like; it becomes part of a file's name."""


@dataclass(frozen=True)
class Record:
    """What ``owner.json`` says: who has the folder."""

    token: str
    purpose: str = ""
    """What is done to the folder, as a participle: ``trained``."""
    host: str = ""
    boot: str = ""
    """The host's boot id; empty where there is none to be had."""
    namespace: str = ""
    """The namespace that ``pid`` counts in; containers on one host have one each."""
    pid: int = 0
    started: str = ""
    """The process's start, in clock ticks since the boot."""
    job: str = ""
    """Slurm's job id, as squeue shows it."""
    restart: int = 0
    """How often Slurm has requeued the job."""
    folder: str = ""
    """The absolute path, without links, as the owner sees it."""
    inode: int = 0
    """This file's own: a copy of it has another."""
    since: str = ""
    command: str = ""

    def is_of(self, here: Record) -> bool:
        """Whether the process is one that ``here`` sees. Machines cloned from one image may have one boot id, hence the host."""
        place = (self.boot, self.namespace, self.host)
        return all(place) and place == (here.boot, here.namespace, here.host)

    def who(self) -> str:
        """``process 7 on n1 (Slurm job 12) since 2026-01-01T00:00:00+00:00``."""
        job = f" (Slurm job {self.job})" if self.job else ""
        return f"process {self.pid} on {self.host}{job} since {self.since}" if self.pid else "another process"


@dataclass(frozen=True)
class StoredRecord:
    """A record as it lies on the disk. ``touched`` differs after every heartbeat."""

    path: Path
    record: Record
    inode: int
    touched: int


def own_record(folder: Path, purpose: str = "") -> Record:
    """A new record for this process."""
    environ = os.environ
    array = environ.get("SLURM_ARRAY_JOB_ID")
    restart = environ.get("SLURM_RESTART_COUNT") or "0"
    return Record(
        token=secrets.token_hex(8),
        purpose=purpose,
        host=socket.gethostname(),
        boot=process.boot_id(),
        namespace=process.pid_namespace(),
        pid=os.getpid(),
        started=process.start_time(os.getpid()) or "",
        job=f"{array}_{environ.get('SLURM_ARRAY_TASK_ID')}" if array else environ.get("SLURM_JOB_ID", ""),
        restart=int(restart) if restart.isdigit() else 0,
        folder=os.path.realpath(folder),
        since=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=mask(shlex.join(sys.argv)),
    )


def create(path: Path, record: Record) -> bool:
    """Put ``record`` at ``path``, unless something is there; returns whether it was put."""
    tmp_path = path.with_name(f".{path.name}.{record.token}")
    try:
        with open(tmp_path, "w", encoding="utf-8") as file:
            _write(file.fileno(), record)
        try:
            os.link(tmp_path, path)
            return True
        except FileExistsError:
            # NFS asks again where the answer was lost.
            return os.stat(tmp_path).st_nlink > 1
        except OSError:
            if os.stat(tmp_path).st_nlink > 1:
                return True
    finally:
        tmp_path.unlink(missing_ok=True)
    # Without hard links: as safe, but for a moment it is there and empty.
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        with open(descriptor, "w", encoding="utf-8"):
            _write(descriptor, record)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _write(descriptor: int, record: Record) -> None:
    text = json.dumps(asdict(replace(record, inode=os.fstat(descriptor).st_ino)), indent=1) + "\n"
    os.write(descriptor, text.encode())
    os.fsync(descriptor)


def read(path: Path) -> StoredRecord | None:
    """What is at ``path``, None if nothing is. Where that is no record, its token is empty."""
    record = Record("")
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            record = parse(file.read()) or record
    except OSError as error:
        # Stale is on NFS what was removed between the opening and the reading.
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise
        if not path.is_symlink():
            return None
        status = os.lstat(path)  # to nothing: the name is taken all the same
    return StoredRecord(path, record, status.st_ino, status.st_mtime_ns)


def parse(text: bytes) -> Record | None:
    """The record that a file's text is; None if it is none (anybody may have edited it), or not yet."""
    try:
        found = json.loads(text)
        record = Record(**{f.name: found[f.name] for f in fields(Record) if f.name in found})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    values = asdict(record)
    typed = all(type(values[f.name]) is type(f.default) for f in fields(Record) if f.name != "token")
    return record if typed and isinstance(record.token, str) and _TOKEN.fullmatch(record.token) else None


def holds(path: Path, record: Record) -> bool:
    """Whether it is ``record`` that lies at ``path``."""
    seen = read(path)
    return seen is not None and seen.record.token == record.token


def claim_on(path: Path, token: str) -> Path:
    """Where the claim on the holder of ``token`` lies."""
    return path.with_name(f".{path.name}.after-{token or 'unreadable'}")


def claim_chain(path: Path) -> list[StoredRecord]:
    """The file, the claim on its owner, the claim on that one's holder, ...: the last one has the right to it."""

    def following() -> Iterator[StoredRecord]:
        at, known = path, set()
        while (seen := read(at)) is not None and at not in known:
            known.add(at)
            yield seen
            at = claim_on(path, seen.record.token)

    return list(following())


def take_over(path: Path, chain: list[StoredRecord], own: Record) -> bool:
    """Take the place of the last of ``chain``, which is dead; returns False where another was faster."""
    claim = claim_on(path, chain[-1].record.token)
    if not create(claim, own):
        return False
    for seen in reversed(chain):
        # Whose place it is may have changed before the claim was ours; from then on it cannot.
        now = read(seen.path)
        if now is None or now.record.token != seen.record.token:
            if holds(claim, own):
                claim.unlink(missing_ok=True)
            break
        with contextlib.suppress(FileNotFoundError):
            # Not there where an earlier holder of this claim, not dead after all, has just renamed it: by name, so it is ours.
            os.replace(claim, seen.path)
        claim = seen.path
    return holds(path, own)
