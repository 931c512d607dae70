"""Files that are there in full or not at all, and errors of the file system that name the operation.

Standard library alone and Python >= 3.8: every package may import this, and the job hook of ``dattrain.submit`` does.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from dattrain.urls import mask

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


def shown(path: Path) -> str:
    """The path as seen from the working folder where it lies below it, for messages."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except (ValueError, OSError):
        return str(path)


def readable_size(nbytes: float) -> str:
    """``1.235 MB``: bytes for people, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"


def counted(count: int, what: str) -> str:
    """``1 map``, ``1,200 classes``: a number of things, for a message."""
    return f"{count:,} {what}{'' if count == 1 else 'es' if what.endswith('s') else 's'}"


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
    """Flush the entries of ``folder`` to the disk (fsync). File systems that cannot are trusted to do it themselves.

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


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False, private: bool = False) -> Iterator[Path]:
    """Give the block an empty file beside ``path`` to write; after it, that file is ``path``, in place of an older one.

    Whoever reads sees the older file or all of the new one. After an error, an interrupt included, nothing is left of it.

    Args:
        path: what the file shall be called in the end. Its folder must be there.
        durable: flush to the disk (fsync) before the renaming, so that a power cut cannot leave ``path`` cut short.
        private: for the user alone to read (mode 0600).

    Raises:
        Failed: naming the operation, beside what the block raises.
    """
    # Two hosts may write into one folder, and the processes of two containers have the same number.
    part = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with doing(f"writing {path.name}"):
            fd = os.open(part, flags, 0o600 if private else 0o666)
        try:
            yield part
            if durable:
                with doing(f"syncing (fsync) {path.name}"):
                    os.fsync(fd)
        finally:
            os.close(fd)
        with doing(f"renaming {part.name} to {path.name}"):
            os.replace(part, path)
    except BaseException:
        # On a file system that may not be written this fails too, and would hide what has happened.
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def write_atomically(
    path: Path, content: str | bytes, *, durable: bool = False, private: bool = False
) -> None:
    """Write a file by ``replacing``: text as UTF-8, or bytes. Raises Failed."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(path, durable=durable, private=private) as part, doing(f"writing {path.name}"):
        part.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """``write_atomically`` of text that may hold the secrets of a URL, which a resume needs: it is then for the user alone to read."""
    write_atomically(path, text, private=mask(text) != text)
