"""Opening regular files alone (a FIFO among pictures or shards would wait for its writer for ever), and listing folders."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256

from dattrain.errors import UserError

_KINDS = ((stat.S_ISFIFO, "a FIFO"), (stat.S_ISDIR, "a folder"), (stat.S_ISSOCK, "a socket"))


def open_file(path: str | os.PathLike[str]) -> int:
    """A descriptor for reading a regular file.

    Raises:
        OSError: it cannot be opened, or is a FIFO, folder, socket or device; ``strerror`` says which.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        kind = next((name for test, name in _KINDS if test(mode)), "a device")
        raise OSError(errno.EINVAL, f"it is {kind}, not a file", os.fspath(path))
    return fd


class OpenFile:
    """A descriptor that is closed when the last reader lets go."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The content of a regular file. Raises OSError as ``open_file``."""
    with open(open_file(path), "rb") as file:
        return file.read()


def sha256_of(fd: int) -> str:
    """The checksum of an open file's bytes, from the first to the last, in hexadecimal. Raises OSError."""
    digest, at = sha256(), 0
    while block := os.pread(fd, 1 << 20, at):
        digest.update(block)
        at += len(block)
    return digest.hexdigest()


@contextmanager
def explained(path: str | os.PathLike[str], done: str = "read") -> Iterator[None]:
    """Raise UserError for an OSError of the block: ``path`` cannot be ``done``, and why."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: cannot be {done} ({error.strerror})") from error


def listing(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """What is in a folder, sorted by name. Raises UserError where that may not be seen."""
    with explained(folder, "listed"), os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)
