"""The run folder: what is written before the first step so that the run can be understood and repeated."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dattrain.config.load import dump, flatten, load, reasons
from dattrain.config.schema import Config
from dattrain.data.classes import Classes
from dattrain.data.classes import write as write_classes
from dattrain.engine import starts
from dattrain.engine.resume_rules import CONFIG
from dattrain.errors import UserError
from dattrain.files import write_text
from dattrain.runtime import revision
from dattrain.runtime.environment import Env
from dattrain.state.checkpointer import versions
from dattrain.urls import mask

CODE = "code.json"


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
        write_text(run_dir / CONFIG, dump(config, _reasons(run_dir / CONFIG, config)))
        write_classes(run_dir, classes)
        if not (run_dir / CODE).exists():
            code, diff = revision.describe()
            if diff:
                (run_dir / revision.DIFF).write_bytes(diff)
            write_text(run_dir / CODE, json.dumps(code, indent=2) + "\n")
        starts.begin(
            run_dir,
            {
                "command": [mask(word) for word in sys.argv],
                "launcher": env.launcher,
                "world": env.world,
                "host": socket.gethostname(),
                "platform": platform.platform(),
                "device": device_name,
                "versions": versions(),
                "slurm_job": os.environ.get("SLURM_JOB_ID"),
                **position,
            },
        )
    except OSError as error:
        raise UserError(f"{run_dir}: the run folder cannot be written: {error.strerror or error}") from error


def _reasons(path: Path, config: Config) -> dict[str, str]:
    """What the file says behind the values that stay as they were."""
    try:
        before = load(path)
    except (UserError, OSError):  # none yet, or of another version
        return {}
    old, new = flatten(before.config), flatten(config)
    return {key: said for key, said in reasons(before).items() if old.get(key) == new.get(key)}
