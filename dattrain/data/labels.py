"""Label sets of ImageNet: which synset a label stands for, its name, and the map from one set to another.

The lists are timm's. They come in the order of WordNet's numbers, which is the order in which the class folders of
ImageNet are numbered, and what the hub's shards hold in ``.cls``. timm has no list of the winter21 release (fall11
without 2,674 classes of people); its 19,167 synsets are read from a file that whoever has the release can write.
"""

from __future__ import annotations

import os
import pkgutil
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dattrain.errors import ConfigError, UserError

SIZES: dict[str, tuple[int, ...]] = {
    "imagenet-1k": (1000,),
    "imagenet-12k": (11821,),
    "imagenet-22k": (21841,),
    "imagenet-22k-winter21": (19167,),
    "imagenet-21k-p": (11221, 10450),
}
"""Classes of each set of ``data.labels``. 21K-P was cut from fall11 (11,221) and from winter21 (10,450)."""

_OTHERS = {
    1001: "ImageNet-1K's and a background class's, as TensorFlow's models number them",
    21842: "those of a fall11 to which n04399382 (teddy) was added (timm's imagenet-22k-ms)",
    21843: "those of Google's ImageNet-21K (BiT, ViT; timm's imagenet-21k-goog)",
}
"""Sizes that people meet and that are no set of ``data.labels``: a recipe for one of them leaves that null."""

TEST_SETS = ("imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-sketch", "imagenet-c", "real")
"""ImageNet's other test sets, which ``dattrain.evaluation.test_sets`` reads."""

SYNSETS_FILE = "synsets.txt"
"""In the current folder: one synset a line, in the order of the labels."""


@dataclass(frozen=True)
class LabelSet:
    """The synsets of labels 0, 1, ...

    Attributes:
        name: as in ``data.labels``.
        synsets: one WordNet id (``n01440764``) per label; names of another kind where a network's classes are no label set.
    """

    name: str
    synsets: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.synsets)

    def names(self) -> list[str]:
        """What each class is called: WordNet's lemmas."""
        info = _timm("imagenet-22k")
        return [info.label_name_to_description(synset) for synset in self.synsets]


@dataclass(frozen=True)
class ClassMap:
    """Where the classes of one set are in another.

    Attributes:
        index: per class of the target, int64: the class of the source, or -1 where it has none.
        missing: names (synsets) of the target that the source has not.
        source, target: names of the two sets.
    """

    index: NDArray[np.int64]
    missing: tuple[str, ...]
    source: str
    target: str

    def report(self) -> str:
        """One line: how many classes were found, and which were not."""
        found = len(self.index) - len(self.missing)
        line = f"{found} of {len(self.index)} classes of {self.target} are in {self.source}"
        if not self.missing:
            return line
        shown = [_with_words(name) for name in self.missing[:5]]
        more = f" and {len(self.missing) - 5} more" if len(self.missing) > 5 else ""
        return f"{line}; missing: {', '.join(shown)}{more}"


def label_set(name: str, *, classes: int | None = None) -> LabelSet:
    """A label set of ``data.labels``.

    Args:
        name: of the set.
        classes: outputs of the head; needed to tell the two releases of 21K-P apart, else fall11's.

    Raises:
        ConfigError: no such set, or one that cannot have ``classes`` classes.
        UserError: winter21 without ``synsets.txt`` in the current folder (timm has no list of it), or with one that is not winter21's or not sorted.
    """
    if classes is not None:
        check_head(name, classes)
    if name == "imagenet-22k-winter21":
        return LabelSet(name, _winter21())
    if name == "imagenet-21k-p" and classes == 10450:
        return LabelSet(name, packaged("imagenet21k_miil_w21_synsets.txt"))
    if name not in SIZES:
        raise ConfigError(f"data.labels={name!r} is not one of {', '.join(SIZES)}")
    subset = {"imagenet-21k-p": "imagenet-21k-miil"}.get(name, name)
    return LabelSet(name, tuple(_timm(subset).label_names()))


def infer(classes: int) -> str | None:
    """The set of ``data.labels`` that has so many classes, or None."""
    return next((name for name, sizes in SIZES.items() if classes in sizes), None)


def class_map(target: LabelSet, source: LabelSet) -> ClassMap:
    """Join two sets by name: 999 of ImageNet-1K's classes are in 22K; n04399382 is not."""
    where = {synset: label for label, synset in enumerate(source.synsets)}
    index = np.asarray([where.get(synset, -1) for synset in target.synsets], dtype=np.int64)
    missing = tuple(synset for synset, at in zip(target.synsets, index) if at < 0)
    return ClassMap(index, missing, source.name, target.name)


def check_head(name: str | None, classes: int) -> None:
    """Compare ``data.labels`` with the outputs of the head (``model.num_classes``).

    Raises:
        ConfigError: the named set has another number of classes. None is any.
    """
    if name is None:
        return
    if name not in SIZES:
        raise ConfigError(f"data.labels={name!r} is not one of {', '.join(SIZES)}")
    if classes not in SIZES[name]:
        sizes = " or ".join(f"{size:,}" for size in SIZES[name])
        other = infer(classes)
        hint = f"; {classes:,} are {other}'s" if other else ""
        if classes in _OTHERS:
            hint = f"; {classes:,} are {_OTHERS[classes]}: leave data.labels null"
        raise ConfigError(
            f"model.num_classes={classes} does not fit data.labels={name}, which has {sizes} classes{hint}"
        )


def read_synsets(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read a list of synsets: the first word of each line; empty lines and ``#`` lines are skipped.

    Raises:
        UserError: it cannot be read, a line is no synset, or one comes twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a list of synsets ({error})") from error
    synsets = [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]
    for number, synset in enumerate(synsets, 1):
        if not re.fullmatch(r"n\d{8}", synset):
            raise UserError(f"{path}: entry {number} is {synset!r}, not a synset like n01440764")
    if len(set(synsets)) != len(synsets):
        twice = next(s for s in synsets if synsets.count(s) > 1)
        raise UserError(f"{path}: {twice} comes twice")
    return tuple(synsets)


def _with_words(name: str) -> str:
    """A synset with what it is called; any other name as it is."""
    if not re.fullmatch(r"n\d{8}", name):
        return name
    try:
        return f"{name} ({_timm('imagenet-22k').label_name_to_description(name)})"
    except KeyError:
        return name


def _winter21() -> tuple[str, ...]:
    size = SIZES["imagenet-22k-winter21"][0]
    path = Path(SYNSETS_FILE)
    if not path.is_file():
        raise UserError(
            f"{path}: the names of imagenet-22k-winter21 need this file, with the release's {size:,} synsets one a "
            f"line in the order of the labels (in the extracted release: `ls -d n* | cut -d. -f1 | sort -u > {SYNSETS_FILE}`)"
        )
    synsets = read_synsets(path)
    unknown = set(synsets) - set(_timm("imagenet-22k").label_names())
    if len(synsets) != size or unknown:
        found = f"{len(synsets):,} synsets" + (f", {len(unknown)} of them not in fall11" if unknown else "")
        raise UserError(f"{path}: holds {found}; winter21 has {size:,} of fall11's 21,841")
    if list(synsets) != sorted(synsets):
        raise UserError(f"{path}: is not sorted; labels number the synsets in the order of their WordNet ids")
    return synsets


@lru_cache(maxsize=4)
def _timm(subset: str) -> Any:
    from timm.data.imagenet_info import ImageNetInfo

    return ImageNetInfo(subset)


def packaged(file: str) -> tuple[str, ...]:
    """The words of a list that timm holds. Raises UserError where it does not."""
    data = pkgutil.get_data("timm.data", f"_info/{file}")
    if data is None:
        raise UserError(f"timm does not hold {file}; install timm 1.0.20 or newer")
    return tuple(data.decode().split())
