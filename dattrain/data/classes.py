"""Which number a class has: decided once, by the label set or the training set, and asked for by name ever after.

Image folders, lists and packed shards know their classes by name. How one of them numbers its names says nothing about
another, or about a network: ``Classes`` does, from the first training step to the last export. Label sets of ImageNet are in
``labels``.
"""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dattrain.data import labels
from dattrain.errors import ConfigError, UserError
from dattrain.files import write_atomically

log = logging.getLogger(__name__)

FILE = "classes.json"
"""In a run folder: the names of output 0, 1, ... as a list; an empty one where labels are bare numbers."""
_MANIFEST = "the manifest (_SPLIT.manifest.json) that `dattrain data pack` wrote beside the shards"


@dataclass(frozen=True)
class Classes:
    """The classes of a network's outputs.

    Attributes:
        count: outputs.
        names: of output 0, 1, ...: synsets, folders, or words of a list. Empty where labels are bare numbers.
        source: who decided, for messages.
        said: (number, name) that samples of the training set state, where nothing names all.

    Raises:
        UserError: a name comes twice.
    """

    count: int
    names: tuple[str, ...] = ()
    source: str = "the network"
    said: frozenset[tuple[int, str]] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", unique(self.names, self.source))

    @property
    def are_label_set(self) -> bool:
        """Whether the names are those of a set of ``data.labels``."""
        own = labels.infer(self.count)
        return own is not None and self.names == labels.label_set(own, classes=self.count).synsets

    def numbers(self, names: Sequence[str], what: str) -> NDArray[np.int64]:
        """The output that each name of another set stands for.

        Names are the network's own, or numbers as ImageNet-V2's folders are, which is said as a warning where the network's
        are no label set. Where the network's names are unknown, synsets are looked up in the label set of its size, and as
        many names as outputs count in their order, which is said as a warning.

        Args:
            what: whose names they are, for messages.

        Raises:
            UserError: a name that is no class of the network, or comes twice.
        """
        names = unique(names, what)
        where = {name: number for number, name in enumerate(self.names)}
        unknown = [name for name in names if name not in where]
        if self.names and not unknown:
            return np.array([where[name] for name in names], dtype=np.int64)
        if all(map(is_number, names)) and not any(map(is_number, self.names)):
            numbers = np.array([int(name) for name in names], dtype=np.int64)
            if numbers.max(initial=-1) < self.count and len(set(numbers.tolist())) == len(names):
                if self.names and not self.are_label_set:
                    log.warning(
                        "%s: its classes are called by numbers, taken for those of %s (%s is %s)",
                        what, self.source, names[0], self.names[numbers[0]],
                    )  # fmt: skip
                return numbers
        if self.names:
            raise UserError(
                f"{what}: {unknown[0]!r} is no class of {self.source} ({few(self.names)}); {len(unknown)} of its "
                f"{len(names)} classes are not"
            )
        own = labels.infer(self.count)
        if own is not None and are_synsets(names):
            known = labels.label_set(own, classes=self.count).synsets
            return Classes(self.count, known, own).numbers(names, what)
        if len(names) == self.count:
            log.warning(
                "%s: nothing says what the network's %d classes are called, so its classes are taken in their order: "
                "0 is %s, %d is %s",
                what, self.count, names[0], self.count - 1, names[-1],
            )  # fmt: skip
            return np.arange(self.count, dtype=np.int64)
        raise UserError(
            f"{what}: its {len(names)} classes ({few(names)}) do not say which of the network's {self.count} they are, of "
            "which no names are known: name them by synset, by number, or like the classes that it was trained on"
        )


def decide(
    names: Sequence[str] | None, num_classes: int, label_set: str | None, what: str, *, hint: str = ""
) -> Classes:
    """The classes of a network that is to be trained: the label set's, else the training set's.

    Args:
        names: of the training set's labels, None where they are bare numbers.
        num_classes: outputs (``model.num_classes``).
        label_set: ``data.labels``.
        what: the training set, for messages.
        hint: ends the message about more or fewer names than outputs.

    Raises:
        ConfigError: more or fewer names than outputs; a label set of another size.
        UserError: a name comes twice; the label set's names are needed and its file is not there.
    """
    names = None if names is None else unique(names, what)
    if label_set is not None:
        labels.check_head(label_set, num_classes)
        try:
            known = labels.label_set(label_set, classes=num_classes).synsets
        except UserError:  # winter21 without its file: bare numbers need none
            if names is not None:
                raise
            known = ()
        return Classes(num_classes, known, f"data.labels={label_set}")
    if names is None:
        return Classes(num_classes, (), what)
    if len(names) != num_classes:
        own = labels.infer(num_classes)
        synsets = (
            f", or data.labels={own} to number synsets by that set" if own and are_synsets(names) else ""
        )
        raise ConfigError(
            f"{what} has {len(names)} classes ({few(names)}), but model.num_classes={num_classes}; set "
            f"model.num_classes={len(names)}{synsets}{hint}"
        )
    return Classes(num_classes, names, what)


def check_labels(largest: int, num_classes: int, what: str) -> None:
    """Refuse labels beyond the head (``model.num_classes``). Raises ConfigError naming ``what``, their set."""
    if largest >= num_classes:
        raise ConfigError(
            f"{what} has labels up to {largest}, but model.num_classes={num_classes}; the data set and the head do not fit"
        )


def absent(classes: Classes, numbers: NDArray[np.int64]) -> list[str]:
    """Names of the network's classes that a set with these class numbers has none of."""
    there = set(numbers.tolist())
    return [name for number, name in enumerate(classes.names) if number not in there]


def bare_numbers(classes: Classes, said: Sequence[tuple[str, int, str]], what: str) -> list[str]:
    """Whether labels that are bare numbers can be the network's class numbers; returns what to tell of it.

    Args:
        said: (key, label, name of the class) of samples that know it.
        what: the set, for messages.

    Raises:
        UserError: a sample's class has another number; or the network's classes are called by numbers that are not theirs,
            so that nobody can tell which are meant.
    """
    if not classes.names:
        if not said:
            return []
        names, numbers = dict(classes.said), {name: number for number, name in classes.said}
        for key, label, name in said:
            form = canonical(name)
            other = names.get(label, form)
            # A synset and its word may be one class.
            if numbers.get(form, label) != label or (
                other != form and are_synsets([other]) == are_synsets([form])
            ):
                raise UserError(
                    f"{what}: {key} is {name!r} by its .json and has label {label}, but by those of {classes.source} "
                    + (f"{form!r} is {numbers[form]}" if form in numbers else f"{label} is {other!r}")
                    + f"; restore {_MANIFEST}, or pack the sets again into one folder"
                )
        key, label, name = said[0]
        return [
            f"{what}: its samples name their classes ({key} is {name!r}, label {label}), and nothing beside the shards names all: "
            f"labels are taken as bare numbers. Restore {_MANIFEST}"
        ]
    check_sampled_names(classes, said, what)
    all_numbers = all(map(is_number, classes.names))
    if any(map(is_number, classes.names)) and not (
        all_numbers and [int(name) for name in classes.names] == list(range(classes.count))
    ):
        raise UserError(
            f"{what}: its labels are bare numbers, and the network's classes are called {few(classes.names)}, which are not their "
            f"numbers; nothing says which are meant: use class folders, or shards that were packed of such"
        )
    if classes.are_label_set:
        return []
    return [
        f"{what}: its labels are bare numbers, taken for those of {classes.source} (0 is {classes.names[0]}); nothing beside it "
        "names its classes"
    ]


def check_sampled_names(classes: Classes, said: Sequence[tuple[str, int, str]], what: str) -> None:
    """Hold labels against what samples say of themselves; arguments as for ``bare_numbers``.

    Raises:
        UserError: a sample's class is one of ``classes`` and has another number there.
    """
    where = {name: number for number, name in enumerate(classes.names)}
    for key, label, name in said:
        if where.get(canonical(name), label) != label:
            raise UserError(
                f"{what}: {key} is {name!r} by its .json and has label {label}, but {name!r} is class {where[canonical(name)]} by "
                f"{classes.source}; restore {_MANIFEST}, or pack the set again"
            )


def write(run_dir: Path, classes: Classes) -> None:
    """Note the classes of a run in its folder."""
    text = json.dumps(list(classes.names), ensure_ascii=False, indent=0) + "\n"
    write_atomically(run_dir / FILE, text.encode(errors="surrogateescape"))


def read(run_dir: Path) -> tuple[str, ...] | None:
    """The names noted in a run folder; None where nothing is (a run of before there was such a file).

    Raises:
        UserError: the file is there and is no list of names.
    """
    path = run_dir / FILE
    try:
        names = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: is no list of class names")
    return tuple(names)


def check(run_dir: Path, classes: Classes) -> None:
    """Refuse to resume with classes that are not those a run was begun with.

    Raises:
        UserError: naming the first class that differs.
    """
    old = read(run_dir)
    if old is not None:
        old = tuple(map(canonical, old))
    if old is None or old == classes.names:
        return
    for number, (before, now) in enumerate(zip(old, classes.names)):
        if before != now:
            what = f"class {number} was {before!r} in this run, and is {now!r} by {classes.source}"
            break
    else:
        what = f"this run has names of {len(old)} classes, and {classes.source} of {len(classes.names)}"
    raise UserError(
        f"{run_dir / FILE}: {what}; give it the data or data.labels that it was begun with, or another --run folder"
    )


def canonical(name: str) -> str:
    """A class name as it is compared: in Unicode's composed form (a Mac's folders have the other), without space around."""
    return unicodedata.normalize("NFC", name).strip()


def unique(names: Sequence[str], what: str) -> tuple[str, ...]:
    """Names as they are compared. Raises UserError where two are one."""
    found: dict[str, str] = {}
    for name in names:
        form = canonical(name)
        if form in found:
            same = (
                "comes twice"
                if name == found[form]
                else f"and {found[form]!a} differ in their Unicode form or in space around alone"
            )
            raise UserError(
                f"{what}: class {name!a} {same}; a class must have one name, and a name one class"
            )
        found[form] = name
    return tuple(found)


def order(names: Sequence[str]) -> list[str]:
    """The order in which a set numbers names by itself: numbers by value, others as text."""
    if all(map(is_number, names)):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def is_number(name: str) -> bool:
    """Whether a name is nothing but digits."""
    return name.isascii() and name.isdigit()


def are_synsets(names: Sequence[str]) -> bool:
    """Whether all are WordNet ids like n01440764."""
    return bool(names) and all(re.fullmatch(r"n\d{8}", name) for name in names)


def few(names: Sequence[str]) -> str:
    """The first names, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
