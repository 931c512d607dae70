"""A bounded folder of whole files on the local disk, shared by the processes of a node, least recently used out first.

A file is there when it has its name: it is written under another, flushed to the disk and renamed. Whoever writes one holds
its lock (``flock``, which the kernel drops when a process dies), so a file is fetched once however many processes
want it, and what a killed process left is known by its free lock and removed. Space is taken before it is filled, so
the folder's files never exceed the bound. The folder should be on a disk of the node: ``flock`` does not reach other
nodes on every network file system.

Users may share it, where the folder lets each write (mode 1777, or a group's): what belongs to another user is read, and
goes only by its owner's hand where the folder is sticky. A folder that cannot be written is read.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dattrain.data.source.files import open_file
from dattrain.errors import UserError

_PART = ".part"
_WAIT_S = 0.05
_MAY_NOT = (errno.EACCES, errno.EPERM, errno.EROFS)


class Unwritable(UserError):
    """The cache does not have a file, and this process may not add it."""


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
        self._part = f".{os.geteuid()}{_PART}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir={folder}: cannot be made ({error.strerror})") from error
        with suppress(OSError):  # it is there, or whoever needs a lock says what is wrong
            self._locks.mkdir(exist_ok=True)
            os.chmod(self._locks, os.stat(self.folder).st_mode & 0o7777)

    def __contains__(self, name: str) -> bool:
        return (self.folder / name).exists()

    def open(self, name: str, size: int | None = None) -> int | None:
        """A descriptor for reading, and the file counts as used now; None where it is not there, or is not of ``size``."""
        try:
            fd = open_file(self.folder / name)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(
                f"data.cache_dir={self.folder}: {name} cannot be read ({error.strerror}); users who share a cache need a umask "
                "that lets the others read (022), or each a folder of their own"
            ) from error
        if size is not None and os.fstat(fd).st_size != size:
            os.close(fd)  # damaged since; whoever writes it anew replaces it
            return None
        self.touch(name)
        return fd

    def touch(self, name: str) -> None:
        """Count a file as used now; nothing where it is not there, or where it is not ours to say so."""
        path, now = self.folder / name, time.time_ns()
        with suppress(OSError):
            try:
                os.utime(path, ns=(now, now))
            except PermissionError:
                os.utime(path)  # of another user's file: now, where it may be written

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
            Unwritable: it is not there, and the folder may not be written.
            UserError: the file is larger than the whole cache, the disk is full, or there is no room since the other files
                may not be removed.
        """
        if size > self.limit:
            raise UserError(
                f"data.cache_gb={self.limit / 1e9:g} does not hold {name}, which has {size / 1e9:g}; make it larger"
            )
        with self._locked(name, wait) as locked:
            if not locked:
                return None
            fd = self.open(name, size)
            if fd is not None:
                return fd
            part = self.folder / (name + self._part)
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

    def remove(self, name: str) -> bool:
        """Delete a file, if it is there; False where we may not."""
        try:
            (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            if error.errno not in _MAY_NOT:
                raise
            return False
        return True

    def used(self) -> int:
        """Bytes of all files, finished or being written."""
        return sum(size for _, size, _ in self._files())

    def _reserve(self, part: Path, size: int, keep: Collection[str]) -> bool:
        """Make room for ``size`` bytes and take it; False where that is not possible now."""
        with self._locked("", True):
            try:
                part.unlink(missing_ok=True)
            except OSError as error:
                self._explain(error)
                raise
            files, stuck, busy = [], 0, 0
            for name, length, used_at in self._files():
                if not name.endswith(_PART):
                    files.append((used_at, length, name))
                # Whose lock we hold, nobody writes.
                elif _of_part(name) != _of_part(part.name) and not self._abandoned(name):
                    busy += length
                elif not self.remove(name):
                    stuck += length
            excess = sum(length for _, length, _ in files) + busy + stuck + size - self.limit
            if excess <= sum(length for _, length, name in files if name not in keep):
                for _, length, name in sorted(files):
                    if excess <= 0:
                        break
                    if name not in keep:
                        gone = self.remove(name)
                        excess -= length if gone else 0
                        stuck += 0 if gone else length
            if excess > 0:
                if stuck + size > self.limit:
                    raise UserError(
                        f"data.cache_dir={self.folder}: {stuck / 1e9:.3g} GB of it belong to other users and may not be "
                        f"removed, so data.cache_gb={self.limit / 1e9:g} has no room for {size / 1e9:.3g} more; make it larger, "
                        "or take a folder of your own"
                    )
                return False
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
        with self._locked(_of_part(part), False) as free:
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
    def _locked(self, name: str, wait: bool) -> Iterator[bool]:
        """Hold the lock of a name ("" is the folder's); yields False where it is taken and we do not wait."""
        fd = self._lock(self._locks / (name + ".lock"))
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

    def _lock(self, path: Path) -> int:
        """A descriptor of a lock: of our own, or of another user's, which need not be writable."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as error:
            # Without O_CREAT: the kernel may refuse that for another's file in a sticky folder (fs.protected_regular).
            for flags in (os.O_RDWR, os.O_RDONLY):
                with suppress(OSError):
                    return os.open(path, flags | os.O_CLOEXEC)
            self._explain(error, but=_MAY_NOT)
            where = path if error.errno == errno.EEXIST else path.parent
            raise self._no_writing(f"{error.strerror}: {where}") from error
        with suppress(OSError):
            os.fchmod(fd, 0o666)  # it holds nothing, and whoever comes needs it
        return fd

    def _explain(self, error: BaseException, but: Collection[int] = ()) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"data.cache_dir={self.folder}: the disk is full ({error.strerror}); free some space, or set "
                f"data.cache_gb (now {self.limit / 1e9:g}) to what there is"
            ) from error
        if isinstance(error, OSError) and error.errno in _MAY_NOT and error.errno not in but:
            raise self._no_writing(error.strerror) from error

    def _no_writing(self, why: str | None) -> Unwritable:
        return Unwritable(
            f"data.cache_dir={self.folder}: lacks a file, and cannot be written ({why}); let all who share it write (chmod "
            "1777), or take a folder of your own"
        )


def _of_part(part: str) -> str:
    """The file that a part becomes: its writer's number stands between."""
    whole = part[: -len(_PART)]
    name, _, writer = whole.rpartition(".")
    return name if writer.isdecimal() else whole
