"""Imports of large libraries, without the garbage collector."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected(library: str) -> Iterator[None]:
    """Hold the garbage collector off while the block imports ``library``, and let it leave alone what is there then (``gc.freeze``).

    What a module makes stays. Looking there for garbage takes a quarter of the imports of a training, and as much again while the
    model is built (docs/benchmarks/start-cpu.md). Nothing happens where ``library`` is imported already: this is for once a process.
    """
    if library in sys.modules:
        yield
        return
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
