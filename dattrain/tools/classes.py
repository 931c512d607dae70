"""What classes are called, and where the folders of another data set lie among a model's classes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dattrain.data import labels
from dattrain.errors import UserError

_SYNSET = re.compile(r"n\d{8}")


def names(num_classes: int, label_set: str | None = None, known: Sequence[str] = ()) -> list[str]:
    """A name per class: ``known`` ones (synsets become words), else the label set's, else ``class 7``.

    Without a label set, 1,000 and 21,841 classes are taken for ImageNet's.
    """
    if len(known) == num_classes:
        return _words(known)
    label_set = label_set or labels.infer(num_classes)
    if label_set is not None:
        try:
            return labels.label_set(label_set, classes=num_classes).names()
        except UserError:  # winter21 needs a file that is not here
            pass
    return [f"class {index}" for index in range(num_classes)]


def of_data(spec: str | None) -> tuple[str, ...]:
    """Class names that a local data set knows: of its manifest, or its class folders; empty where there are none."""
    if spec is None or "://" in spec:
        return ()
    folder = Path(spec) if os.path.isdir(spec) else Path(spec).parent
    for manifest in sorted(folder.glob("_*.manifest.json")):
        try:
            found = json.loads(manifest.read_text(encoding="utf-8")).get("classes")
        except (OSError, ValueError):
            continue
        if isinstance(found, list) and found:
            return tuple(map(str, found))
    if os.path.isdir(spec) and not any(folder.glob("*.tar")):
        return tuple(sorted(e.name for e in os.scandir(spec) if e.is_dir() and not e.name.startswith(".")))
    return ()


def locate(
    folders: Sequence[str], num_classes: int, label_set: str | None, known: Sequence[str] = ()
) -> np.ndarray:
    """Class of the model that each folder of a data set stands for, int64.

    Folders are synsets of the model's label set, its class names, or numbers (ImageNet-V2); other names count in sorted
    order when there are as many as classes.

    Raises:
        UserError: a folder that is none of the model's classes.
    """
    folders = list(folders)
    if folders and all(_SYNSET.fullmatch(name) for name in folders):
        synsets = [name for name in known if _SYNSET.fullmatch(name)]
        if len(synsets) != num_classes:
            own = label_set or labels.infer(num_classes)
            if own is None:
                raise UserError(
                    f"the folders are synsets ({folders[0]}, ...), but the model's {num_classes} classes are of no known "
                    "label set; set data.labels in its recipe"
                )
            synsets = list(labels.label_set(own, classes=num_classes).synsets)
        return _lookup(folders, synsets, "synset of the model's classes")
    if len(known) == num_classes and set(folders) <= set(known):
        return _lookup(folders, list(known), "class")
    if folders and all(name.isdigit() and int(name) < num_classes for name in folders):
        return np.array([int(name) for name in folders], dtype=np.int64)
    if len(folders) == num_classes:
        return np.arange(num_classes, dtype=np.int64)
    raise UserError(
        f"{len(folders)} class folders ({', '.join(folders[:3])}, ...) do not say which of the model's {num_classes} "
        "classes they are: name them by synset, by number, or like the classes the model was trained on"
    )


def _lookup(folders: list[str], classes: list[str], what: str) -> np.ndarray:
    where = {name: index for index, name in enumerate(classes)}
    missing = [name for name in folders if name not in where]
    if missing:
        raise UserError(
            f"folder {missing[0]} is no {what} ({len(missing)} of {len(folders)} folders are not)"
        )
    return np.array([where[name] for name in folders], dtype=np.int64)


def _words(known: Sequence[str]) -> list[str]:
    if not known or not all(_SYNSET.fullmatch(name) for name in known):
        return list(known)
    try:
        return labels.LabelSet("", tuple(known)).names()
    except KeyError:
        return list(known)
