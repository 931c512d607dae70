"""How much memory this process may still take on its host: what the kernel calls available, within the limit of its control group."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")


def available(meminfo: Path = Path("/proc/meminfo"), group: Path = _GROUP) -> int:
    """Bytes; half of what is installed where the system does not tell.

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
