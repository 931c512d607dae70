"""What a training starts from: a recipe and a new run folder, or the run folder of one that resumes."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
        ConfigError: neither a recipe nor a run folder; a run folder and another one at once; what can be no folder.
    """
    run, which = split_checkpoint(recipe)
    if which is not None:
        raise ConfigError(
            f"{recipe}: a run resumes at its last checkpoint (dattrain train {run}); to start another from these weights, give a "
            f"recipe and init.from={recipe}"
        )
    if run_dir is not None:
        check_folder_name(run_dir)
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


def absolute(config: Config) -> Config:
    """The config with its local paths (data, cache, initial weights) absolute: a run can then be used from any folder.

    ``..`` and links stay as they are. URLs and commands (``pipe:``) are no paths; in a working folder whose own name would read as a
    pattern, patterns stay relative.
    """
    data = config.data
    found: dict[str, Any] = {"train": _absolute_data(data.train), "val": _absolute_data(data.val)}
    if data.cache_dir is not None:
        found["cache_dir"] = os.path.join(os.getcwd(), data.cache_dir)
    init = config.init
    if init.from_:
        init = init.model_copy(update={"from_": os.path.join(os.getcwd(), init.from_)})
    return config.model_copy(update={"data": data.model_copy(update=found), "init": init})


def _absolute_data(spec: str | None) -> str | None:
    here = os.getcwd()
    if not spec or ":/" in spec or spec.startswith("pipe:") or re.search(r"[][{}*?]|::", here):
        return spec
    return "::".join(os.path.join(here, part) if part else part for part in spec.split("::"))


def split_checkpoint(word: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """``RUN@best``, ``RUN@last`` and ``RUN@STEP`` as the run and what stands behind the ``@``; None for any other path.

    A path that is there is never divided.
    """
    path = Path(word)
    run, at, which = path.name.rpartition("@")
    if not at or not run or os.path.lexists(path):
        return path, None
    return path.with_name(run), which


def check_folder_name(folder: Path) -> None:
    """Refuse what can become no run folder.

    Raises:
        ConfigError: a file, something in a file, a URL, a name that the file system does not take.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.\-]*:/", str(folder)):
        raise ConfigError(
            f"--run {folder}: a run folder is local, and this is a URL; give a folder on a disk that all ranks see"
        )
    if re.search(r"@(best|last|\d+)$", folder.name):
        raise ConfigError(
            f"--run {folder}: names a checkpoint of a run, not a run folder; leave out what follows the @"
        )
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(folder)
        there = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
        if there.is_dir():
            return
    except (OSError, ValueError) as error:
        raise ConfigError(f"--run {folder}: is no name of a folder ({error})") from None
    what = "is a file" if there.is_file() else "is no folder"
    raise ConfigError(
        f"--run {folder}: {what if there == folder else f'cannot be a folder, since {there} {what}'}; give the name of a folder, "
        "new or of a run to resume"
    )


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
