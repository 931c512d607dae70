"""Other processes of this machine, as Linux shows them under /proc. Elsewhere nothing is known of any."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def boot_id() -> str:
    """The kernel's id of this boot; empty where there is none to be had."""
    return _text("/proc/sys/kernel/random/boot_id")


def pid_namespace() -> str:
    """The namespace that this process's number counts in (containers have one each); empty where there is none to be had."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def start_time(pid: int) -> str | None:
    """Start of a process in clock ticks after boot, which with its number names it; None if there is no such process.

    Nor of a zombie, once all of its threads have ended: one that is in a call of the file system ends later than the first.
    """
    found = _stat(pid)
    return None if found is None or (found[0] in "ZX" and int(found[17]) <= 1) else found[19]


def began() -> float:
    """When this process began, in seconds of ``time.time``; now, where that is not known."""
    ticks = start_time(os.getpid())
    up = _text("/proc/uptime").partition(" ")[0]
    if ticks is None or not up:
        return time.time()
    return time.time() - max(0.0, float(up) - int(ticks) / os.sysconf("SC_CLK_TCK"))


def suspended(pid: int) -> bool:
    """Whether a process was stopped (SIGSTOP, Ctrl-Z)."""
    found = _stat(pid)
    return found is not None and found[0] in "Tt"


def hidden(pid: int) -> bool:
    """Whether there is such a process of another user, of which /proc shows nothing (mounted with ``hidepid``)."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return _stat(pid) is None
    except (OSError, OverflowError):
        pass
    return False


def dying(pid: int) -> bool:
    """Whether no instruction of its program runs any more: it is being taken down, or SIGKILL is on its way to it."""
    found = _stat(pid)
    if found is None or int(found[6]) & 0x4:  # PF_EXITING
        return True
    for line in _text(f"/proc/{pid}/status").splitlines():
        key, _, value = line.partition(":")
        if key in ("SigPnd", "ShdPnd") and int(value, 16) >> (signal.SIGKILL - 1) & 1:
            return True
    return False


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _stat(pid: int) -> list[str] | None:
    """Fields of ``/proc/PID/stat`` from the state on; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
