"""What a training starts from: a recipe and a new run folder, or the run folder of one that resumes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from dattrain.config import shipped
from dattrain.config.load import Overrides, load
from dattrain.config.schema import Config
from dattrain.errors import ConfigError


def resolve(
    recipe: str | Path, overrides: Overrides, run_dir: Path | None, environ: Mapping[str, str]
) -> tuple[Config, Path]:
    """The config and the run folder that are meant.

    Args:
        recipe: a recipe (file, or name of a shipped one), or a run folder to resume.
        overrides: as of ``config.load.load``.
        run_dir: the run folder; None takes that of ``recipe``, or a new one.
        environ: variables of the process, which tell whether it is one rank of several.

    Raises:
        ConfigError: neither a recipe nor a run folder; a run folder and another one at once.
    """
    path = shipped.find(recipe)
    if path.is_dir():
        if not (path / "config.yaml").is_file():
            raise ConfigError(f"{path} is not a run folder: it has no config.yaml")
        if run_dir is not None and run_dir.absolute() != path.absolute():
            raise ConfigError(f"{path} is a run folder already; leave out --run {run_dir}")
        return load(path, overrides).config, path
    config = load(path, overrides).config
    return config, run_dir or new_folder(config.name, environ)


def is_rank(environ: Mapping[str, str]) -> bool:
    """Whether a launcher started this process as one of several. A Slurm step of one task, as an interactive shell is, is none."""
    tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or "1"
    return "RANK" in environ or ("SLURM_STEP_ID" in environ and tasks != "1")


def run_of(folder: Path) -> Path | None:
    """The run folder that a checkpoint, ``checkpoints`` or run folder belongs to: the one with ``config.yaml``."""
    return next((p for p in (folder, *folder.absolute().parents[:2]) if (p / "config.yaml").is_file()), None)


def new_folder(name: str, environ: Mapping[str, str]) -> Path:
    """``runs/<recipe>-<time>``, one that is not there. Several processes must be given one, so that all take the same."""
    if int(environ.get("WORLD_SIZE") or environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        raise ConfigError("give --run: each rank would name the run folder by its own clock")
    first = path = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    number = 1
    while path.exists():
        number += 1
        path = first.with_name(f"{first.name}-{number}")
    return path
