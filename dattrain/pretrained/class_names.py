"""What classes are called, for people; which numbers they have is in ``dattrain.data.classes``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dattrain.data import labels
from dattrain.data.classes import are_synsets
from dattrain.errors import UserError
from dattrain.text import one_line


def names(num_classes: int, label_set: str | None = None, known: Sequence[str] = ()) -> list[str]:
    """A name per class: ``known`` ones (synsets become words), else the label set's, else ``class 7``.

    A thousand classes need not be ImageNet's.
    """
    if len(known) == num_classes:
        return _words(known)
    if label_set is not None:
        try:
            return labels.label_set(label_set, classes=num_classes).names()
        except UserError:  # winter21 needs a file that is not here
            pass
    return [f"class {index}" for index in range(num_classes)]


def read(file: Path, num_classes: int) -> list[str]:
    """Class names, one a line. Raises UserError when there are not as many as classes."""
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    if len(names) != num_classes:
        raise UserError(f"{file}: {len(names)} names, but the model has {num_classes} classes")
    return names


def _words(known: Sequence[str]) -> list[str]:
    if not are_synsets(known):
        return [one_line(name) for name in known]
    try:
        return labels.LabelSet("", tuple(known)).names()
    except KeyError:
        return list(known)
