"""A bounded folder of whole files on the local disk, shared by the processes of a node, least recently used out first.

A file is there when it has its name: it is written aside, flushed to the disk and renamed. Whoever writes one holds
its lock (``flock``, which the kernel drops when a process dies), so a file is fetched once however many processes
want it, and what a killed process left is known by its free lock and removed. Space is taken before it is filled, so
the folder's files never exceed the bound. The folder should be on a disk of the node: ``flock`` does not reach other
nodes on every network file system.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dattrain.errors import UserError

_PART = ".part"
_WAIT_S = 0.05


class Cache:
    """Files by name.

    Args:
        folder: made if missing. Nothing else should be in it.
        limit: bound in bytes, over finished files and those being written.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int) -> None:
        self.folder = Path(folder)
        self.limit = limit
        self._locks = self.folder / ".locks"
        try:
            self._locks.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir={folder}: cannot be made ({error.strerror})") from error

    def __contains__(self, name: str) -> bool:
        return (self.folder / name).exists()

    def open(self, name: str) -> int | None:
        """A descriptor for reading, and the file counts as used now; None where it is not there."""
        try:
            fd = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        self.touch(name)
        return fd

    def touch(self, name: str) -> None:
        """Count a file as used now; nothing where it is not there."""
        now = time.time_ns()
        with suppress(FileNotFoundError):
            os.utime(self.folder / name, ns=(now, now))

    def fetch(
        self,
        name: str,
        size: int,
        write: Callable[[int], object],
        *,
        wait: bool = True,
        keep: Collection[str] = (),
    ) -> int | None:
        """A descriptor of a file, which is written first where it is not there.

        Args:
            size: of the file in bytes.
            write: given a descriptor of an empty file of ``size`` bytes, fills it. What it raises is passed on, and no
                file is left.
            wait: for another process that is writing it, and for room. Else None is returned.
            keep: files that may not go to make room.

        Raises:
            UserError: the file is larger than the whole cache, or the disk is full.
        """
        if size > self.limit:
            raise UserError(
                f"data.cache_gb={self.limit / 1e9:g} does not hold {name}, which has {size / 1e9:g}; make it larger"
            )
        with self._held(name, wait) as held:
            if not held:
                return None
            fd = self.open(name)
            if fd is not None:
                return fd
            part = self.folder / (name + _PART)
            while not self._reserve(part, size, keep):
                if not wait:
                    return None
                time.sleep(_WAIT_S)
            try:
                fd = os.open(part, os.O_RDWR | os.O_CLOEXEC)
                try:
                    write(fd)
                    os.fsync(fd)
                    os.rename(part, self.folder / name)
                except BaseException:
                    os.close(fd)
                    raise
            except BaseException as error:
                part.unlink(missing_ok=True)
                self._explain(error)
                raise
        self.touch(name)
        return fd

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        (self.folder / name).unlink(missing_ok=True)

    def used(self) -> int:
        """Bytes of all files, finished or being written."""
        return sum(size for _, size, _ in self._files())

    def _reserve(self, part: Path, size: int, keep: Collection[str]) -> bool:
        """Make room for ``size`` bytes and take it; False where that is not possible now."""
        with self._held("", True):
            part.unlink(missing_ok=True)
            files = []
            for name, length, used_at in self._files():
                if name.endswith(_PART) and self._abandoned(name):
                    self.remove(name)
                else:
                    files.append((used_at, length, name))
            excess = sum(length for _, length, _ in files) + size - self.limit
            gone = []
            for _, length, name in sorted(files):
                if excess <= 0:
                    break
                if not name.endswith(_PART) and name not in keep:
                    gone.append(name)
                    excess -= length
            if excess > 0:
                return False
            for name in gone:
                self.remove(name)
            try:
                with open(part, "wb") as file:
                    if size:
                        os.posix_fallocate(file.fileno(), 0, size)
            except BaseException as error:
                part.unlink(missing_ok=True)
                self._explain(error)
                raise
            return True

    def _abandoned(self, part: str) -> bool:
        with self._held(part[: -len(_PART)], False) as free:
            return free

    def _files(self) -> Iterator[tuple[str, int, int]]:
        """Name, bytes and time of last use of each file."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.is_file():
                    try:
                        status = entry.stat()
                    except FileNotFoundError:
                        continue
                    yield entry.name, status.st_size, status.st_mtime_ns

    @contextmanager
    def _held(self, name: str, wait: bool) -> Iterator[bool]:
        """Hold the lock of a name ("" is the folder's); yields False where it is taken and we do not wait."""
        fd = os.open(self._locks / (name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            try:
                yield True
            finally:
                # Explicitly: a worker that was forked meanwhile has the same descriptor, and closing ours would not do.
                fcntl.flock(fd, fcntl.LOCK_UN)
        finally:
            os.close(fd)

    def _explain(self, error: BaseException) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"data.cache_dir={self.folder}: the disk is full ({error.strerror}); free some space, or set "
                f"data.cache_gb (now {self.limit / 1e9:g}) to what there is"
            ) from error
