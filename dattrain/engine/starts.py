"""``env.json``: every start of a run, where and with what, and how it ended. Pure of torch, since ``status`` reads it.

A start without an end runs, or was killed.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dattrain.files import reason, write_text

FILE = "env.json"
BY_HAND = ("single", "local", "torchrun")
"""Launchers (``runtime.environment``) of a start that somebody typed. A job's is of Slurm or submitit."""

log = logging.getLogger(__name__)


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The starts, oldest first; empty where there are none, or the file cannot be read."""
    try:
        found = json.loads((run_dir / FILE).read_text(encoding="utf-8"))["starts"]
        return [dict(start) for start in found]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is not readable (%s)", run_dir / FILE, error)
        return []


def begin(run_dir: Path, start: Mapping[str, Any]) -> None:
    """Add a start: now, by this process. Raises OSError."""
    _write(run_dir, [*read(run_dir), {"time": _now(), "pid": os.getpid(), **start}])


def end(run_dir: Path, status: str, why: str, step: int | None) -> None:
    """Note how this process's start ended, if it is the newest.

    Where that cannot be written, a warning says so: what ended the run matters more.

    Args:
        status: ``finished``, ``stopped``, ``preempted`` or ``failed``.
        why: the limit, signal, file or error that ended it.
        step: updates done; None where none was.
    """
    starts = read(run_dir)
    if not starts or starts[-1].get("pid") != os.getpid():
        return
    done = starts[-1].get("step") if step is None else step
    starts[-1]["end"] = {"time": _now(), "status": status, "why": why.partition("\n")[0], "step": done}
    try:
        _write(run_dir, starts)
    except OSError as error:
        log.warning("%s: the end of the run cannot be noted (%s)", run_dir / FILE, reason(error))


def began(start: Mapping[str, Any]) -> float:
    """When it began, in seconds of ``time.time``; 0 where that cannot be read."""
    try:
        return datetime.datetime.fromisoformat(start["time"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return 0.0


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _write(run_dir: Path, starts: list[dict[str, Any]]) -> None:
    write_text(run_dir / FILE, json.dumps({"starts": starts}, indent=2) + "\n")
