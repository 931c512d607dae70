"""The run folder: what is written before the first step so that the run can be understood and repeated."""

from __future__ import annotations

import datetime
import json
import logging
import os
import platform
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dattrain.config.load import dump
from dattrain.config.schema import Config
from dattrain.data.classes import Classes
from dattrain.data.classes import write as write_classes
from dattrain.engine.resume_rules import CONFIG
from dattrain.errors import UserError
from dattrain.files import reason, write_text
from dattrain.runtime import revision
from dattrain.runtime.environment import Env
from dattrain.state.checkpointer import versions
from dattrain.urls import mask

CODE, ENVIRONMENT = "code.json", "env.json"

log = logging.getLogger(__name__)


def open_run(
    run_dir: Path, config: Config, classes: Classes, env: Env, device_name: str, position: Mapping[str, Any]
) -> None:
    """Write ``config.yaml``, ``classes.json``, ``code.json`` with its diff, and ``env.json``.

    Rank 0 calls it, once the recipe is known to run; a recipe that passed ``resume_rules.check_settings`` replaces the one before.
    ``position`` is noted with the start: ``step``, ``last_step``.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text(run_dir / CONFIG, dump(config))
        write_classes(run_dir, classes)
        if not (run_dir / CODE).exists():
            code, diff = revision.describe()
            if diff:
                (run_dir / revision.DIFF).write_bytes(diff)
            write_text(run_dir / CODE, json.dumps(code, indent=2) + "\n")
        _note_start(run_dir / ENVIRONMENT, env, device_name, position)
    except OSError as error:
        raise UserError(f"{run_dir}: the run folder cannot be written: {error.strerror or error}") from error


def note_end(run_dir: Path, status: str, why: str, step: int) -> None:
    """Write into ``env.json`` how the newest start ended; one without that was killed, or runs.

    Args:
        status: ``finished``, ``stopped``, ``preempted`` or ``failed``.
        why: the limit, signal, file or error that ended it.
        step: updates done.
    """
    try:
        starts = _starts(run_dir / ENVIRONMENT)
        if starts:
            starts[-1]["end"] = {"time": _now(), "status": status, "why": why, "step": step}
            write_text(run_dir / ENVIRONMENT, json.dumps({"starts": starts}, indent=2) + "\n")
    except OSError as error:  # what ended the run is to be said, not this
        log.warning("%s: the end of the run cannot be noted (%s)", run_dir / ENVIRONMENT, reason(error))


def _starts(path: Path) -> list[dict[str, Any]]:
    if path.is_file():
        try:
            return list(json.loads(path.read_text(encoding="utf-8"))["starts"])
        except (ValueError, KeyError, TypeError):
            log.warning("%s is not readable; it is written anew", path)
    return []


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _note_start(path: Path, env: Env, device_name: str, position: Mapping[str, Any]) -> None:
    starts = _starts(path)
    starts.append(
        {
            "time": _now(),
            "command": [mask(word) for word in sys.argv],
            "launcher": env.launcher,
            "world": env.world,
            "host": socket.gethostname(),
            "platform": platform.platform(),
            "device": device_name,
            "versions": versions(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            **position,
        }
    )
    write_text(path, json.dumps({"starts": starts}, indent=2) + "\n")
