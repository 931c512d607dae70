"""What classes are called, for people; which numbers they have is in ``dattrain.data.classes``."""

from __future__ import annotations

from collections.abc import Sequence

from dattrain.data import labels
from dattrain.data.classes import are_synsets
from dattrain.errors import UserError


def names(num_classes: int, label_set: str | None = None, known: Sequence[str] = ()) -> list[str]:
    """A name per class: ``known`` ones (synsets become words), else the label set's, else ``class 7``: a thousand classes
    need not be ImageNet's."""
    if len(known) == num_classes:
        return _words(known)
    if label_set is not None:
        try:
            return labels.label_set(label_set, classes=num_classes).names()
        except UserError:  # winter21 needs a file that is not here
            pass
    return [f"class {index}" for index in range(num_classes)]


def _words(known: Sequence[str]) -> list[str]:
    if not are_synsets(known):
        return list(known)
    try:
        return labels.LabelSet("", tuple(known)).names()
    except KeyError:
        return list(known)
