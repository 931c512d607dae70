"""Memory of the host: how much this process may still take, and what becomes of what it frees."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def available(meminfo: Path = Path("/proc/meminfo"), group: Path = _GROUP) -> int:
    """Bytes that the kernel calls available, within the limit of the control group; half of what is installed where the system does not tell.

    Args:
        meminfo: Linux's table, in kB.
        group: control group (version 2) with ``memory.max`` and ``memory.current``, as a container or a job has it.
    """
    found: list[int] = []
    with suppress(OSError, ValueError, IndexError, StopIteration):
        lines = meminfo.read_text(encoding="utf-8").splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    with suppress(OSError, ValueError):  # "max" is no number: no limit
        limit = int((group / "memory.max").read_text(encoding="utf-8"))
        found.append(max(0, limit - int((group / "memory.current").read_text(encoding="utf-8"))))
    return min(found) if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


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
