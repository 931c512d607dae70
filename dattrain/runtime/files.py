"""What a checkpoint asks of a file system, with errors that name the operation."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF})
"""What file systems answer that have no fsync for folders."""


class Failed(OSError):
    """An operation of the file system that failed: ``operation`` says which; ``errno`` as in the error that it came from."""

    def __init__(self, operation: str, error: OSError) -> None:
        super().__init__(error.errno, error.strerror or str(error))
        self.operation = operation

    def __str__(self) -> str:
        return f"{self.operation}: {reason(self)}"


def reason(error: OSError) -> str:
    """``ENOSYS: Function not implemented``."""
    if error.errno is None:
        return error.strerror or ": ".join(map(str, error.args))
    name = errno.errorcode.get(error.errno)
    text = os.strerror(error.errno)
    return f"{name}: {text}" if name else text


@contextlib.contextmanager
def doing(operation: str) -> Iterator[None]:
    """Give an OSError of the block the name of what was tried; one that has a name keeps it.

    Raises:
        Failed: in place of the OSError.
    """
    try:
        yield
    except Failed:
        raise
    except OSError as error:
        raise Failed(operation, error) from error


def sync(folder: Path) -> None:
    """fsync of a folder: its entries are on the disk. File systems that have no such call are trusted to do it themselves.

    Raises:
        OSError: the entries may be lost: the disk failed, or is full (EIO, ENOSPC, EDQUOT and whatever else says so).
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(fd)
