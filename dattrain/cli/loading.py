"""A line that says what takes its time before anything else can be said: the import of torch and what stands on it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from dattrain.runtime.imports import uncollected


@contextlib.contextmanager
def loading(what: str, *, always: bool = False) -> Iterator[None]:
    """Say ``loading ...`` on stderr while the block runs, which imports: on a terminal, where the line goes away again, or ``always``. One rank says it."""
    terminal = sys.stderr.isatty()
    first = (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") == "0"
    said = first and (terminal or always)
    if said:
        print(f"loading {what} ...", end="" if terminal else "\n", file=sys.stderr, flush=True)
    try:
        with uncollected("torch", ours=True):
            yield
    finally:
        if said and terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
