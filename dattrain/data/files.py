"""Opening regular files alone: a FIFO among pictures or shards would wait for its writer for ever."""

from __future__ import annotations

import errno
import os
import stat

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


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The content of a regular file. Raises OSError as ``open_file``."""
    with open(open_file(path), "rb") as file:
        return file.read()
