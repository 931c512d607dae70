"""Tables and colours of text, for a terminal. Standard library alone."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import IO, Any

STYLES = {"error": "31", "warning": "33", "good": "1;32", "faint": "2"}
"""Sequences of ECMA-48 by what is said."""


def columns(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Rows (all of as many cells) as lines, in columns two spaces apart; those whose numbers are in ``right`` end flush."""
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    return [
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def has_colour(stream: IO[str] | Any, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether what is written to ``stream`` may be coloured: a terminal that has colours, and no ``NO_COLOR`` (no-color.org)."""
    terminal = bool(getattr(stream, "isatty", lambda: False)())
    return terminal and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


def styled(text: str, style: str, stream: IO[str] | Any) -> str:
    """``text`` in a style of ``STYLES`` where ``stream`` has colours, else as it is; so for a style that is none."""
    code = STYLES.get(style)
    return f"\x1b[{code}m{text}\x1b[0m" if code and text and has_colour(stream) else text


def one_line(name: str) -> str:
    """A name of a file or a class as it can be drawn and printed: on one line, bytes that are not UTF-8 as escapes."""
    return " ".join(name.encode("utf-8", "backslashreplace").decode().split())


def shortened(name: str, letters: int = 28) -> str:
    """A name of so many letters at most, so that a long one does not take the place of all."""
    return name if len(name) <= letters else f"{name[: letters - 3].rstrip()}..."
