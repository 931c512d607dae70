"""Checkpoints by the names that people give: ``RUN`` and ``RUN@last``, ``RUN@best``, ``RUN@STEP``, or a checkpoint's own folder.

Every place that takes the weights of a run asks here. The best is that of ``checkpoint.metric`` in the run's recipe, among the
complete checkpoints that were evaluated.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from dattrain.config.load import load as load_config
from dattrain.config.run import run_of, split_checkpoint
from dattrain.config.schema import Config
from dattrain.errors import UserError
from dattrain.files import shown
from dattrain.state.format import checkpoint
from dattrain.state.format.checkpoint import CheckpointInfo
from dattrain.state.format.retention import by_metric

log = logging.getLogger(__name__)


def find(word: str | os.PathLike[str], *, hint: bool = False) -> Path:
    """The folder of the checkpoint that ``word`` means; of a run without ``@`` the newest complete one.

    Args:
        hint: where that is not the best of its run, say so as a warning.

    Raises:
        UserError: there is none; lists those that there are.
    """
    run, which = split_checkpoint(word)
    if which is None:
        folder = checkpoint.locate(run)
        if hint and folder.absolute() != run.absolute() and (text := better(run, folder)):
            log.warning("%s", text)
        return folder
    if not run.is_dir():
        raise UserError(f"{word}: there is no run folder {run}")
    if which == "last":
        return checkpoint.locate(run)
    complete = _complete(run)
    if which == "best":
        metric = metric_of(run)
        ranked = by_metric(complete, metric)
        if not ranked:
            raise UserError(
                f"{word}: no checkpoint was evaluated by {metric} (checkpoint.metric); there are {_listed(complete)}: give "
                f"{run}@last or {run}@STEP"
            )
        return ranked[0].folder
    if not re.fullmatch(r"(step_)?\d+", which):
        raise UserError(f"{word}: behind the @ stands best, last or a step; there are {_listed(complete)}")
    step = int(which.removeprefix("step_"))
    for entry in complete:
        if entry.step == step:
            return entry.folder
    raise UserError(f"{word}: there is no complete checkpoint of step {step}; there are {_listed(complete)}")


def weights(word: str | os.PathLike[str], *, hint: bool = False) -> Path:
    """``find`` for a name with ``@``, a run or a checkpoint; a file, or what is not there, stays as it is."""
    path, which = split_checkpoint(word)
    return find(word, hint=hint) if which is not None or path.is_dir() else path


def better(run: Path, used: Path) -> str | None:
    """A line that names the best checkpoint of ``run`` where it is better than ``used``; None where that is the best."""
    complete = _complete(run)
    metric = metric_of(run)
    found = next(iter(by_metric(complete, metric)), None)
    mine = next((e for e in complete if e.folder.name == used.name), None)
    if found is None or mine is None or found.step == mine.step:
        return None
    value, own = found.metric(metric), mine.metric(metric)
    assert value is not None
    if own is not None and own == value:
        return None
    has = f"has {metric} {own:.4g}" if own is not None else "was not evaluated"
    root = run.parent if run.name == "checkpoints" else run
    return f"{shown(root)}: step {mine.step}, its last, {has}; step {found.step} has {value:.4g}: {shown(root)}@best"


def metric_of(run: Path) -> str:
    """``checkpoint.metric`` of the recipe of a run, or of a ``checkpoints`` folder; the default without a recipe."""
    folder = run_of(run)
    config = Config() if folder is None else load_config(folder / "config.yaml").config
    return config.checkpoint.metric


def _complete(run: Path) -> list[CheckpointInfo]:
    root = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    return [entry for entry in checkpoint.list_all(root) if entry.manifest is not None]


def _listed(entries: Sequence[CheckpointInfo]) -> str:
    if not entries:
        return "no complete checkpoints"
    return "those of steps " + ", ".join(str(entry.step) for entry in entries)
