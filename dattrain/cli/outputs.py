"""What a verb is to write: whether it can be written, asked before it works for hours, and tables as CSV."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dattrain.errors import UserError


def check_file(option: str, path: Path | None) -> None:
    """Refuse a place for a file, of which ``option`` is; its folders may have to be made. Raises UserError."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; name a file", exit_code=2)
    check_folder(option, path, path.absolute().parent)


def check_folder(option: str, path: Path | None, folder: Path | None = None) -> None:
    """Refuse a place for a folder that is there or can be made. Raises UserError.

    Args:
        path: what ``option`` names, for the message.
        folder: where it differs, the folder that is written to.
    """
    if path is None:
        return
    place = (folder or path).absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        what = "is a file; name a folder" if place == path.absolute() else f"{place} is no folder"
        raise UserError(f"{option} {path}: {what}", exit_code=2)
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path}: {place} cannot be written", exit_code=2)


def to_stdout(path: Path | None) -> bool:
    """Whether a file is to be standard output."""
    return path == Path("-")


class _Nowhere:
    def writerow(self, row: Sequence[object]) -> None:
        """Not asked for."""


@contextmanager
def rows(path: Path | None, head: Sequence[str]) -> Iterator[Any]:
    """What takes rows under ``head`` by ``writerow``: a CSV at ``path`` or on standard output (``-``), or nothing (None)."""
    if path is None:
        yield _Nowhere()
    elif to_stdout(path):
        table = csv.writer(sys.stdout)
        table.writerow(head)
        yield table
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            table = csv.writer(file)
            table.writerow(head)
            yield table
