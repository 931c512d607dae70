"""Rows of a classifier by the names of its classes: what ``init.head`` may keep and how it maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dattrain.config.load import load as load_config
from dattrain.config.run import run_of
from dattrain.data import labels
from dattrain.data.classes import FILE as CLASSES_FILE
from dattrain.data.classes import Classes, few
from dattrain.data.classes import read as read_classes
from dattrain.errors import ConfigError


def source_classes(path: Path, count: int, *, guess: bool) -> Classes:
    """The classes of the ``count`` outputs of ``init.from``, without names where nothing says them.

    Its run folder or file names them, else its label set, else (``guess``) the label set of that size.

    Raises:
        UserError: its label set needs a file that is not there.
    """
    names: tuple[str, ...] = ()
    label_set: str | None = None
    if path.is_file():
        metadata = _metadata(path)
        names, label_set = tuple(metadata.get("classes") or ()), metadata.get("labels")
    elif (run := run_of(path)) is not None:
        names = read_classes(run) or ()
        label_set = load_config(run / "config.yaml").config.data.labels
    label_set = label_set or (labels.infer(count) if guess else None)
    if len(names) != count and label_set is not None:
        names = labels.label_set(label_set, classes=count).synsets
    return Classes(count, names if len(names) == count else (), f"init.from={path}")


def class_map(target: Classes, source: Classes) -> labels.ClassMap:
    """Where each class of the new head is in the source's, by name.

    Raises:
        ConfigError: the names of one of them are unknown, or they have no class in common.
    """
    if not source.names:
        raise ConfigError(
            f"init.head=map: nothing says what the {source.count} classes of {source.source} are called; it takes a "
            f"data.labels, a run folder with {CLASSES_FILE}, or a file that `dattrain export` wrote"
        )
    if not target.names:
        raise ConfigError(
            "init.head=map needs the names of the new head's classes: set data.labels, or train on class folders or "
            "shards that `dattrain data pack` wrote of such"
        )
    found = labels.class_map(
        labels.LabelSet(target.source, target.names), labels.LabelSet(source.source, source.names)
    )
    if len(found.missing) == target.count:
        raise ConfigError(
            f"init.head=map: no class of {target.source} ({few(target.names)}) is one of {source.source} "
            f"({few(source.names)}); init.head=new draws a fresh head"
        )
    return found


def check_same(target: Classes, source: Classes) -> None:
    """Refuse ``init.head=keep`` where a row of the head would come to stand for another class.

    Raises:
        ConfigError: there are more or fewer, or both are known by name, and differ.
    """
    if target.count != source.count:
        raise ConfigError(
            f"init.head=keep needs the same classes: {source.source} has {_counted(source)}, {target.source} {_counted(target)}; "
            "init.head=map joins classes by name, init.head=new draws a fresh head"
        )
    if not target.names or not source.names:
        return
    for number, (new, old) in enumerate(zip(target.names, source.names)):
        if new != old:
            raise ConfigError(
                f"init.head=keep: class {number} is {old!r} in {source.source} and {new!r} by {target.source}; "
                "init.head=map joins classes by name, init.head=new draws a fresh head"
            )


def _counted(classes: Classes) -> str:
    return f"{classes.count}" + (f" ({few(classes.names)})" if classes.names else "")


def _metadata(path: Path) -> dict[str, Any]:
    """What a weights file says of itself; empty where it says nothing."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
    try:
        found = json.loads(header.get("dattrain", "{}"))
        return {**found, "classes": found.get("classes") or json.loads(header.get("classes", "[]"))}
    except (ValueError, AttributeError):
        return {}
