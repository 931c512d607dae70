"""What the C library does with memory that a training on CPUs frees, to ask for as much again in the next update."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed(environ: Mapping[str, str] = os.environ) -> bool:
    """Have glibc keep what is freed for the next tensor; whether it does.

    By default it gets memory from the kernel for each tensor above 32 MiB, and for what lies at the heap's end, and gives it back. The
    kernel fills every page with zeros: 90,000 pages in an update of DAT-T with four images, a fifth of its time
    (docs/benchmarks/step-cpu.md). The process keeps the most that it ever held. It is left alone where ``environ`` tunes malloc itself
    (``GLIBC_TUNABLES``, ``MALLOC_...``), and where the C library is another one.
    """
    if "glibc.malloc" in environ.get("GLIBC_TUNABLES", "") or any(k.startswith("MALLOC_") for k in environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
