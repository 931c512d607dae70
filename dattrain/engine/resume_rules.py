"""What a resumed run may not change, judged against what its newest checkpoint recorded: a start and a submission ask here.

``config.yaml`` is no judge, since whoever edits it would be compared with himself. Each manifest holds a ``record`` in its
``meta``: the settings on which weights, order and position depend, the identity of the training set, and that of the class
names. Pure of torch; reads files, writes none.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from dattrain.config.load import flatten
from dattrain.config.load import load as load_config
from dattrain.config.run import check_folder_name
from dattrain.config.schema import Config
from dattrain.data import classes as class_names
from dattrain.data import identity
from dattrain.data.classes import Classes
from dattrain.data.decode.images import is_image_name
from dattrain.data.identity import Part
from dattrain.data.source.shards import expand, holds_shards, open_local
from dattrain.errors import ConfigError, Damaged, UserError
from dattrain.state.format.manifest import read_manifest

META = "fixed"
CONFIG = "config.yaml"
DEPENDS = {
    "task.": "the weights depend",
    "model.": "the weights depend",
    "geometry.crop": "what a training image is depends",
    "geometry.short_side": "what a training image is depends",
    "geometry.long_side": "what a training image is depends",
    "geometry.scale": "what a training image is depends",
    "data.lanes": "the order of the data depends",
    "data.window": "the order of the data depends",
    "data.shuffle": "the order of the data depends",
    "data.reader": "the order of the data depends",
    "train.seed": "the order of the data depends",
    "train.global_batch": "the position in the schedule depends",
}
"""Settings that a resumed run cannot change (a section ends in a dot), and what depends on them."""

log = logging.getLogger(__name__)


def check_folder(run: Path) -> None:
    """Refuse to begin a run in a folder of images or shards; other files, as of a job's script, may be there.

    Raises:
        ConfigError: the folder holds them, or nothing but class folders; it can be no folder.
    """
    check_folder_name(run)
    if (run / CONFIG).is_file() or not run.is_dir():
        return
    entries = _some_entries(run)
    if entries and all(entry.is_dir() for entry in entries):
        entries = _some_entries(entries[0])
    found = next((e for e in entries if is_image_name(e.name) or e.name.endswith(".tar")), None)
    if found is not None:
        raise ConfigError(f"{run} is no run folder, it holds {found.path}; choose another --run")


def _some_entries(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(islice(entries, 1000))


def settings(config: Config) -> dict[str, Any]:
    """The values of the settings in ``DEPENDS``, by dotted key, as JSON holds them."""
    values = config.model_dump(mode="json", by_alias=True)
    found: dict[str, Any] = {}
    for key in flatten(config):
        if key.startswith(tuple(DEPENDS)):
            section, _, name = key.partition(".")
            found[key] = values[section][name]
    return found


def record(config: Config, data: Sequence[Part], classes: Classes) -> dict[str, Any]:
    """What a manifest keeps in ``meta["fixed"]``. JSON.

    Args:
        data: identity of the training set (``dattrain.data.identity``).
        classes: of the network's outputs.
    """
    return {"settings": settings(config), "data": list(data), "classes": _digest(classes)}


def newest(run: Path) -> tuple[str, Mapping[str, Any]] | None:
    """Name and ``meta`` of the newest checkpoint of a run whose manifest can be read; rank files are not looked at.

    The ``meta`` is empty where there are checkpoints and none can be read; None where there are none.
    """
    folders = sorted(
        run.glob("checkpoints/step_*"), key=lambda path: (len(path.name), path.name), reverse=True
    )
    for folder in folders:
        try:
            return folder.name, read_manifest(folder).meta
        except (Damaged, OSError):
            continue
    return (folders[0].name, {}) if folders else None


def check_settings(run: Path, config: Config, name: str, meta: Mapping[str, Any]) -> None:
    """Refuse settings that are not those of a run's newest checkpoint.

    Args:
        name: of the checkpoint, for messages.
        meta: its manifest's. One that records no settings (of an older version, or written by DeepSpeed) leaves the judgement to
            the run's ``config.yaml``.

    Raises:
        ConfigError: naming the setting, both values, and what to do.
    """
    path = run / CONFIG
    now = settings(config)
    then = _recorded(meta, "settings")
    if then is None:
        if not path.exists():
            log.warning(
                "%s records no settings, and there is no %s: nothing tells whether they are the same",
                name,
                path,
            )
            return
        log.info("%s records no settings; they are compared with %s", name, path)
        then, name = settings(load_config(path).config), CONFIG
    # What one version has and the other has not, cannot be compared.
    changed = [key for key, value in then.items() if key in now and now[key] != value]
    if not changed:
        return
    key = changed[0]
    what = next(what for prefix, what in DEPENDS.items() if key.startswith(prefix))
    here = f"{path} says" if name != CONFIG and _in_file(path, key) == now[key] else "this recipe says"
    # The reader dali is gone.
    advice = "Choose" if then.get("data.reader") == "dali" else "Put it back, or choose"
    more = "".join(f"; {key}={then[key]}, not {now[key]}" for key in changed[1:4])
    raise ConfigError(
        f"{run} has checkpoints of {key}={then[key]} ({name}), but {here} {key}={now[key]}; {what} on it{more}"
        f"{'; ...' if len(changed) > 4 else ''}. {advice} another --run folder (and init.from={run} to start from "
        "these weights)"
    )


def check_data(
    run: Path,
    config: Config,
    name: str,
    meta: Mapping[str, Any],
    data: Sequence[Part],
    samples_per_epoch: int | None = None,
) -> None:
    """Refuse a training set that is not the one of a run's newest checkpoint, wherever it lies now.

    Args:
        name, meta: as for ``check_settings``. A manifest that records no set leaves it at the number of samples, if it has that.
        data: identity of the training set.
        samples_per_epoch: as its loader has it; None where there is no loader.

    Raises:
        UserError: naming in which way it differs.
    """
    then = _recorded(meta, "data")
    how = None if then is None else identity.difference(then, data)
    before = meta.get("samples_per_epoch")
    if how is None and None not in (before, samples_per_epoch) and before != samples_per_epoch:
        how = f"{before} samples an epoch, now {samples_per_epoch}"
    if how is not None:
        raise UserError(
            f"data.train={config.data.train}: is not what {name} of {run} was trained with ({how}); the order of the data depends "
            f"on it. Give it the same data, or choose another --run folder (and init.from={run} to start from these weights)"
        )


def check_classes(run: Path, name: str, meta: Mapping[str, Any], classes: Classes) -> None:
    """Refuse class numbers that are not those of a run's newest checkpoint, or (one that records none) of ``classes.json``.

    Raises:
        UserError: naming the first class that differs, where ``classes.json`` tells.
    """
    then = _recorded(meta, "classes")
    if then == _digest(classes):
        return
    class_names.check(run, classes)
    if then is not None:
        raise UserError(
            f"{name} of {run} was trained with other class names, or another order of them, than {classes.source} has "
            f"({class_names.few(classes.names)}); give it the data or data.labels that it was begun with, or another --run folder"
        )


def look(config: Config) -> list[Part] | None:
    """The identity of ``data.train`` where a glance at local records tells.

    None where it is elsewhere, or would have to be listed file by file: the job's start sees it then.
    """
    spec = config.data.train
    if spec is None or ":/" in spec or config.data.reader == "webdataset":
        return None
    try:
        if os.path.isdir(spec) and not holds_shards(spec):
            return None
        return identity.of_shards(open_local(expand(spec)))
    except UserError:
        return None


def _recorded(meta: Mapping[str, Any], key: str) -> Any:
    found = meta.get(META)
    return found.get(key) if isinstance(found, Mapping) else None


def _in_file(path: Path, key: str) -> Any:
    try:
        return settings(load_config(path).config).get(key)
    except (UserError, OSError):
        return None


def _digest(classes: Classes) -> str:
    return sha256(json.dumps(list(classes.names)).encode()).hexdigest()
