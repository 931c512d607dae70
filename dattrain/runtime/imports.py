"""Imports of large libraries, without the garbage collector."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected(library: str, *, ours: bool = False) -> Iterator[None]:
    """Hold the garbage collector off while the block imports ``library``; nothing happens where that is imported already.

    What a module makes stays. Looking there for garbage takes a quarter of the imports of a training, and as much again while the
    model is built (docs/benchmarks/start-cpu.md).

    Args:
        library: the module.
        ours: whether nobody else's objects are in this process: what is there afterwards is then left alone for good (``gc.freeze``).
    """
    if library in sys.modules:
        yield
        return
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if ours:
            gc.freeze()
        if enabled:
            gc.enable()
