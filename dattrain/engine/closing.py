"""The last words of a training: its accuracy, and the commands that come next, as they work when they are typed. Pure but for looking."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote

from dattrain.config.schema import Config
from dattrain.data.decode.images import is_image_name
from dattrain.data.source import split_file
from dattrain.errors import UserError
from dattrain.files import shown
from dattrain.state.format import checkpoint
from dattrain.state.format.retention import best_step

_LOOK_AT = 1000
"""Files and folders at most that are looked at to find a picture."""


def closing_lines(
    run_dir: Path, config: Config, status: str, found: Mapping[int, float]
) -> list[tuple[str, str]]:
    """Lines, each with its style (``text.STYLES``, or empty). The last one names the run folder.

    Args:
        status: as of ``trainer.Outcome``.
        found: ``observe.metrics.scores`` of the run.
    """
    run, metric = shown(run_dir), config.checkpoint.metric
    at, lines = "", []
    if found:
        last, best = max(found), best_step(found, metric)
        lines.append(
            (
                f"{metric}: best {found[best]:.4g} at step {best}, last {found[last]:.4g} at step {last}",
                "good",
            )
        )
        kept = {entry.step for entry in checkpoint.list_all(run_dir / "checkpoints") if entry.manifest}
        if best in kept and best != max(kept):
            at = "@best"
        elif best not in kept:
            lines.append(
                (
                    f"no checkpoint of step {best} is kept (checkpoint.every_epochs, checkpoint.keep_best)",
                    "",
                )
            )
    if status == "finished":
        lines.append(("next:", ""))
        lines += [(f"  dattrain {words}", "") for words in next_commands(run, at, config)]
    else:
        lines.append((f"it goes on with: dattrain train {quote(run)}", ""))
    return [*lines, (f"run folder: {run}", "")]


def next_commands(run: str, at: str, config: Config) -> Sequence[str]:
    """What is done with a trained run: verbs and their arguments."""
    weights = quote(f"{run}{at}")
    picture = _picture(config.data.val) or _picture(config.data.train) or "PICTURE.jpg"
    evaluated = [f"eval {weights}"] if config.data.val is not None else []
    return [
        *evaluated,
        f"predict {quote(picture)} --checkpoint {weights}",
        f"report {quote(run)}",
        f"export {weights} --to {'timm' if config.task.kind == 'classification' else 'hub'} --out {quote(f'{run}/export')}",
    ]


def _picture(spec: str | None) -> str | None:
    """A picture of an image folder or of a list of its files; None where there is none to be seen at once."""
    if spec is not None and spec.endswith(split_file.SUFFIX):
        try:
            root, classes = split_file.read(spec)
        except UserError:
            return None
        return next((shown(root / files[0]) for files in classes.values() if files), None)
    if spec is None or not os.path.isdir(spec):
        return None
    looked = 0
    for folder, _, names in os.walk(spec):
        for name in sorted(names):
            if is_image_name(name):
                return shown(Path(folder) / name)
        looked += 1 + len(names)
        if looked > _LOOK_AT:
            break
    return None
