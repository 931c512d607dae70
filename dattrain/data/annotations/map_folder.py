"""A folder of images beside one of maps, as ADE20K is given out: ``DIR/images/training`` and ``DIR/annotations/training``.

Names of the classes stand in ``DIR``: ``objectInfo150.txt`` (ADE20K's own: a map's 0 is void, 1 is the first class), or ``classes.txt``
(one name a line; a map's 0 is the first, 255 is void).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np

from dattrain.data.annotations import maps
from dattrain.data.annotations.ade20k import ADE20K
from dattrain.data.annotations.annotated import AnnotatedFiles
from dattrain.data.classes import few
from dattrain.data.decode.images import is_image_name
from dattrain.data.source.annotation_index import Annotations
from dattrain.data.source.files import explained, listing, read_file
from dattrain.data.source.sample import BadSample
from dattrain.errors import UserError
from dattrain.files import counted

PAIRS = {"images": "annotations", "img_dir": "ann_dir"}
"""Names of the folders of images, and of those of maps that lie beside them (ADE20K's, mmseg's)."""
SPLITS = frozenset({"training", "validation", "train", "val", "test", "testing"})
"""Names of folders that are parts of one set."""
ADE_NAMES, OWN_NAMES = "objectInfo150.txt", "classes.txt"
_RELEASE = "ADEChallengeData2016"


def map_folder(folder: str) -> Path | None:
    """Where the maps of a folder of images lie; None where it is no such folder.

    Raises:
        UserError: ``folder`` holds ``images`` and ``annotations`` itself, or ``images`` lie in it without maps beside, or it
            holds several splits.
    """
    here = Path(folder).absolute()
    for own, other in PAIRS.items():
        if (here / own).is_dir() and (here / other).is_dir():
            splits = [entry.name for entry in listing(here / own) if entry.is_dir()] or [""]
            raise UserError(
                f"{folder}: holds {own} and {other}; name the images of one split, as {os.path.join(folder, own, splits[0])}"
                + (f" (it has {few(splits)})" if len(splits) > 1 else "")
            )
    for level, part in reversed(list(enumerate(here.parts))):
        if part not in PAIRS:
            continue
        beside = Path(*here.parts[:level], PAIRS[part], *here.parts[level + 1 :])
        splits = [entry.name for entry in listing(here) if entry.is_dir() and entry.name in SPLITS]
        if level == len(here.parts) - 1 and len(splits) > 1:
            raise UserError(
                f"{folder}: holds {few(splits)}, which are not to be mixed; name one, as {os.path.join(folder, splits[0])}"
            )
        inside = [entry for entry in listing(here) if not entry.name.startswith(".")]
        # Beside folders of classes images may stray, which are told elsewhere.
        flat = not any(entry.is_dir() for entry in inside)
        holds_images = flat and any(is_image_name(entry.name) for entry in inside)
        if beside.is_dir() and (holds_images or next(_files(beside, _is_map_name), None)):
            return beside
        if holds_images:
            raise UserError(
                f"{folder}: its images lie in it directly, and there are no maps of their classes in {beside}; put these there to "
                "segment, or the images of each class into a folder of its own to classify"
            )
    return None


class MapFolder(AnnotatedFiles):
    """Images below ``root``, each with a PNG of the same path and stem below ``beside``.

    Args:
        root: folder of one split's images.
        beside: ``map_folder(root)``.
        names: of the classes, and whether a map's 0 is void and its 1 the first class; None reads them from the set.

    Raises:
        UserError: nothing names the classes, there are no images, or two of them would have one map.
    """

    annotations: Annotations = "maps"

    def __init__(self, root: str, beside: Path, names: tuple[Sequence[str], bool] | None = None) -> None:
        own = Path(root).absolute()
        self.classes, self._from_one = class_names(root, beside) if names is None else names
        self.maps = beside
        files = sorted(_files(own, lambda name: True))
        found = [file for file in files if is_image_name(file)]
        unread = [file for file in files if not is_image_name(file)]
        if not found and unread:
            raise UserError(f"{root}: has no images; it holds {few(unread)}, which are not read")
        super().__init__(root, own, found)
        maps_there = list(_sizes(beside))
        stems = [_stem(file) for file in found]
        if twice := _of_one_stem(found):
            raise UserError(
                f"{root}: {few(twice)} would share one map, {beside / _stem(twice[0])}.png; give each a name of its own"
            )
        if twice := _of_one_stem([file for file, _ in maps_there]):
            raise UserError(f"{beside}: {few(twice)} would be maps of one image; remove all but one")
        there = {_stem(file): size for file, size in maps_there}
        self._names = {_stem(file): file for file, _ in maps_there if not file.endswith(".png")}
        sizes = np.asarray([there.get(stems[i], -1) for i in self.place.tolist()], dtype="<i8")
        self._digest = sha256(sizes.tobytes()).hexdigest()
        without = [file for file, stem in zip(found, stems) if stem not in there]
        own_stems = set(stems)
        spare = [file for file, _ in maps_there if _stem(file) not in own_stems]
        lost = [file for file in unread if _stem(file) in there]
        self.notes = _left_out(own, unread)
        self.flaws = tuple(
            f"{flaw}: {few(sorted(names))}"
            for names, flaw in (
                (without, f"{root}: {len(without):,} of {len(found):,} images have no map in {beside}"),
                (spare, f"{beside}: {counted(len(spare), 'map')} without an image in {root}"),
                (lost, f"{root}: {counted(len(lost), 'image')} in a format that is not read"),
            )
            if names
        )

    @property
    def annotation_digest(self) -> str:
        """Of the maps' sizes in bytes."""
        return self._digest

    def annotation(self, sample: int) -> bytes:
        """The map, its numbers being those of ``classes``."""
        stem = _stem(self.file(sample))
        path = self.maps / self._names.get(stem, f"{stem}.png")
        data = read_map(path, self.root / self.file(sample))
        return _from_zero(data, len(self.classes or ()), str(path)) if self._from_one else data


def read_map(path: Path, image: Path) -> bytes:
    """The bytes of the map of an image. Raises BadSample where there is none, or an empty file."""
    try:
        data = read_file(path)
    except OSError as error:
        raise BadSample(
            f"{image}: its map cannot be read: {path} ({error.strerror}); a map is a PNG of that name"
        ) from error
    if not data:
        raise BadSample(f"{path}: the map has zero bytes")
    return data


def named_classes(path: Path) -> list[str]:
    """The classes that a file names, one a line in the order of their numbers. Raises UserError for none, or too many for a map."""
    names = [line.strip() for line in _lines(path)]
    while names and not names[-1]:
        names.pop()
    if "" in names:
        raise UserError(
            f"{path}: line {names.index('') + 1} is blank, and lines count as numbers; name that class too (as unused), or take the "
            "line out if the next class has its number"
        )
    if not 0 < len(names) <= maps.VOID:
        raise UserError(f"{path}: names {len(names)} classes; a map holds 1 to {maps.VOID}")
    return names


def _lines(path: Path) -> list[str]:
    """Lines of a text file. Raises UserError where it cannot be read, or is not UTF-8."""
    with explained(path):
        try:
            return path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: is not UTF-8 (byte {error.start} is {error.object[error.start]:#x}); save it as that"
            ) from None


def class_names(root: str, beside: Path) -> tuple[list[str], bool]:
    """Names of the classes of a folder's maps, and whether a map's 0 is void and its 1 the first class.

    Raises:
        UserError: nothing names them, or two files do.
    """
    top = Path(os.path.commonpath([Path(root).absolute(), beside]))
    if (top / ADE_NAMES).is_file() and (top / OWN_NAMES).is_file():
        raise UserError(
            f"{top}: holds {ADE_NAMES} (0 is void, 1 the first class) and {OWN_NAMES} (0 is the first class); remove the one that the maps "
            "do not follow"
        )
    if (top / ADE_NAMES).is_file():
        return _ade_names(top / ADE_NAMES), True
    if (top / OWN_NAMES).is_file():
        return named_classes(top / OWN_NAMES), False
    if top.name.startswith(_RELEASE):
        return list(ADE20K), True
    raise UserError(
        f"{root}: nothing names the classes of its maps; put {top / OWN_NAMES} there (one name a line: the first is number 0 of the maps, "
        f"and {maps.VOID} is void), or ADE20K's own {ADE_NAMES} (0 is void, 1 the first class)"
    )


def _ade_names(path: Path) -> list[str]:
    """First names of the rows of ``objectInfo150.txt``: number, share, images of each split, names with commas between."""
    lines = _lines(path)
    rows = [line.split("\t") for line in lines[1:] if line.strip()]
    numbers = [row[0].strip() for row in rows]
    if not rows or numbers != [str(i + 1) for i in range(len(rows))] or len(rows) >= maps.VOID:
        raise UserError(
            f"{path}: its rows must be numbered 1, 2, ... in its first column (by tabs), and the last one name the class; it has "
            f"{few(numbers)}"
        )
    names = [row[-1].strip() for row in rows]
    first = [re.split(r"[,;]", name)[0].strip() for name in names]
    return first if len(set(first)) == len(first) else names


def _from_zero(data: bytes, classes: int, where: str) -> bytes:
    """A map whose 0 is void and whose 1 is the first class, with the numbers that are used here: 0 the first, 255 void."""
    numbers = maps.read(data, where)
    if numbers.max(initial=0) > classes:
        y, x = (int(place[0]) for place in np.nonzero(numbers > classes))
        raise BadSample(
            f"{where}: has {numbers[y, x]} at x={x}, y={y}; by the {ADE_NAMES} of its set 0 is void, and 1 to {classes} are the classes. "
            f"Where its maps count from 0, name its classes in {OWN_NAMES} instead"
        )
    # In eight bits 0 - 1 is 255.
    return maps.write(numbers - np.uint8(1), level=0)  # it is read again at once


def _files(root: Path, wanted: Callable[[str], bool]) -> Iterator[str]:
    """Paths below the root of the files whose names are wanted; hidden folders are left alone."""
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        for entry in listing(root / folder):
            path = os.path.join(folder, entry.name)
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                waiting.append(path)
            elif wanted(entry.name):
                yield path


def _sizes(root: Path) -> Iterator[tuple[str, int]]:
    """Path below the root and size in bytes of every PNG."""
    for path in _files(root, _is_map_name):
        with explained(root / path):
            yield path, os.stat(root / path).st_size


def _is_map_name(name: str) -> bool:
    return name.lower().endswith(".png")


def _stem(file: str) -> str:
    """What an image and its map have in common."""
    return os.path.splitext(file)[0]


def _of_one_stem(files: Sequence[str]) -> list[str]:
    """Files that would be one sample's; none where all have a name of their own."""
    stem, count = Counter(map(_stem, files)).most_common(1)[0] if files else ("", 0)
    return [file for file in files if _stem(file) == stem] if count > 1 else []


def _left_out(root: Path, files: Sequence[str]) -> tuple[str, ...]:
    """One line per kind of file that is not read."""
    kinds: dict[str, list[str]] = {}
    for file in files:
        kinds.setdefault(f"{os.path.splitext(file)[1].lower() or 'extensionless'} file", []).append(file)
    return tuple(
        f"{root}: {counted(len(names), kind)} left out: {few(names)}" for kind, names in kinds.items()
    )
