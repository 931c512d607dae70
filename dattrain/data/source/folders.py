"""A folder of images per class as a data set.

Listing calls no ``stat`` but for links: a folder of millions of files on a network file system takes the time of reading
its directories.
"""

from __future__ import annotations

import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b, sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dattrain.data.classes import few, order
from dattrain.data.decode.images import is_image_name
from dattrain.data.source.files import listing
from dattrain.data.source.image_files import ImageFiles
from dattrain.errors import UserError

_HIDDEN = frozenset({"@eaDir", "__MACOSX", "lost+found"})
"""Beside names that begin with a dot: thumbnails of a NAS, what a Mac puts into zip files, what ``fsck`` found."""
TRAINING = frozenset({"train", "training"})
OTHER_SPLITS = frozenset({"val", "valid", "validation", "dev", "test", "testing"})


class FolderDataset(ImageFiles):
    """A folder ``root/<class>/**/<image>``; labels number the class folders, sorted (by value where all are numbers).

    The files are one shard in a fixed scrambled order (by a hash of the name), since the order's windows would
    otherwise keep classes together; random access costs a folder nothing. Each directory is read once, whatever links
    lead to it; hidden folders are left alone; ``notes`` count what was left out. ``digest`` is SHA-256 of the hashes of all names
    below the root, in order.

    Raises:
        UserError: no class folder; one without images, or that is a link to what is not there, or to another one; folders
            that are splits (train, val) and not classes.
    """

    def __init__(self, root: str) -> None:
        classes = class_folders(root)
        walk = _Walk(Path(root), classes)

        def files() -> Iterator[tuple[int, str]]:
            for label, folder in enumerate(classes):
                empty = True
                for file in walk.files(folder):
                    empty = False
                    yield label, file
                if empty:
                    raise UserError(f"{Path(root) / folder}: a class folder without images{walk.why(folder)}")

        self._take(root, Path(root), classes, files())
        self.notes = walk.notes()

    def _take(self, name: str, root: Path, classes: list[str], files: Iterable[tuple[int, str]]) -> None:
        """Become the set of ``files``: label and path below ``root`` of each."""
        self.classes = classes
        names, ends, labels, keys = bytearray(), array("q", [0]), array("i"), array("Q")
        for label, file in files:
            encoded = os.fsencode(file)
            names += encoded
            ends.append(len(names))
            labels.append(label)
            keys.append(scrambled(encoded))
        if not labels:
            raise UserError(f"{name}: has neither tar shards nor class folders with images")
        # One string of all names: a list of 14 million would take gigabytes, and be copied in every worker by its counts.
        self._names = bytes(names)
        self._ends = np.frombuffer(ends, dtype=np.int64)
        place = np.argsort(np.frombuffer(keys, dtype=np.uint64), kind="stable")
        self._place = _by_name(place, np.frombuffer(keys, dtype=np.uint64), self._walked)
        super().__init__(name, root, np.frombuffer(labels, dtype=np.int32)[self._place])
        self.digest = sha256(np.frombuffer(keys, dtype="<u8")[self._place].tobytes()).hexdigest()

    def file(self, sample: int) -> str:
        """See ``ImageFiles.file``."""
        return self._walked(int(self._place[sample]))

    def by_class(self) -> dict[str, list[str]]:
        """Paths below the root of each class's files, sorted."""
        assert self.classes is not None
        found: dict[str, list[str]] = {name: [] for name in self.classes}
        for sample, label in enumerate(self._labels.tolist()):
            found[self.classes[label]].append(self.file(sample))
        return {name: sorted(files) for name, files in found.items()}

    def covers(self, place: Path) -> bool:
        """Whether files in that folder would be read as this set's, or as another set in its place."""
        place, root = place.resolve(), self.root.resolve()
        return place == root or (root in place.parents and not _hidden(place.relative_to(root).parts[0]))

    def _walked(self, number: int) -> str:
        """Path below the root of a file, by its number in the order of the walk."""
        return os.fsdecode(self._names[self._ends[number] : self._ends[number + 1]])


def class_folders(root: str | os.PathLike[str]) -> list[str]:
    """Names of the class folders, in the order of their labels.

    Raises:
        UserError: one is a link to what is not there; all are splits; two are one folder.
    """
    found: dict[str, str] = {}
    for entry in listing(root):
        if _hidden(entry.name):
            continue
        if entry.is_symlink() and not os.path.exists(entry.path):
            if is_image_name(entry.name):
                continue
            raise UserError(
                f"{entry.path}: a link to {os.readlink(entry.path)}, which is not there; without this class folder the "
                "others would be numbered anew. Mount what it points to, or remove the link"
            )
        if entry.is_dir():
            other = found.setdefault(os.path.realpath(entry.path), entry.name)
            if other != entry.name:
                raise UserError(f"{root}: the class folders {other} and {entry.name} are one and the same")
    names = order(list(found.values()))
    # What all begin with is the set's name: imagenet21k_train, imagenet21k_val.
    low = [name.lower() for name in names]
    shared = os.path.commonprefix(low) if len(low) > 1 else ""  # noqa: RUF071 (names, not paths)
    begin = len(re.sub(r"[^-_ .]*$", "", shared))
    bare = {re.sub(r"[-_ .]?(set|images|data|[0-9]+)$", "", name[begin:]) for name in low}
    if bare and (bare <= TRAINING | OTHER_SPLITS or (bare & TRAINING and bare & OTHER_SPLITS)):
        train = next((name for name in names if name.lower() in TRAINING), names[0])
        raise UserError(
            f"{root}: holds {few(names)}, which are splits and not classes; name one of them, as in "
            f"data.train={os.path.join(root, train)}, or have `dattrain train --data {root}` look for them"
        )
    return names


class _Walk:
    """Lists the image files of class folders, each directory once, and counts what it leaves out."""

    def __init__(self, root: Path, classes: Sequence[str]) -> None:
        self.root = root
        self._real_root = os.path.realpath(root)
        self._seen = {self._real_root, *(os.path.realpath(root / name) for name in classes)}
        self._left: Counter[str] = Counter()
        self._example: dict[str, str] = {}
        for entry in listing(root):
            if is_image_name(entry.name) and not entry.is_dir():
                self._leave_out("image beside the class folders", entry.name)

    def files(self, folder: str) -> Iterator[str]:
        """Paths below the root of the images of one class folder."""
        waiting = [(folder, os.path.realpath(self.root / folder))]
        while waiting:
            parent, real_parent = waiting.pop()
            for entry in listing(self.root / parent):
                name = os.path.join(parent, entry.name)
                if entry.is_dir():
                    link = entry.is_symlink()
                    real = os.path.realpath(entry.path) if link else os.path.join(real_parent, entry.name)
                    if _hidden(entry.name):
                        self._leave_out("hidden folder", name)
                    elif self._is_elsewhere(real) if link else real in self._seen:
                        self._leave_out("link to a folder that is read elsewhere", name)
                    else:
                        if link:
                            self._seen.add(real)
                        waiting.append((name, real))
                elif entry.name.startswith("."):
                    continue
                elif not is_image_name(entry.name):
                    extension = os.path.splitext(entry.name)[1].lower()
                    self._leave_out(f"{extension} file" if extension else "file without extension", name)
                elif entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):
                    # A link to nothing is a bad sample: it is met when it is read, like any file that is damaged.
                    yield name
                else:
                    self._leave_out("pipe, socket or device", name)

    def why(self, folder: str) -> str:
        """What there is instead of images."""
        inside = [
            f"{name} ({what})" for what, name in self._example.items() if name.startswith(folder + os.sep)
        ]
        return f"; it holds {', '.join(inside[:3])}" if inside else ""

    def notes(self) -> tuple[str, ...]:
        """One line per kind of thing that was left out."""
        return tuple(
            f"{self.root}: {count} {what}{'s' if count > 1 and what.endswith(('file', 'folder')) else ''} left out: "
            f"{self._example[what]}{', ...' if count > 1 else ''}"
            for what, count in self._left.most_common()
        )

    def _is_elsewhere(self, real: str) -> bool:
        """Whether what a link leads to is read by another way, or holds the class folders."""
        holds_root = self._real_root.startswith(real.rstrip(os.sep) + os.sep)
        return holds_root or real in self._seen or any(real.startswith(seen + os.sep) for seen in self._seen)

    def _leave_out(self, what: str, name: str) -> None:
        self._left[what] += 1
        self._example.setdefault(what, name)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in _HIDDEN


def scrambled(name: bytes) -> int:
    """A fixed pseudo-random number of a name, the same on every machine."""
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "big")


def _by_name(
    place: NDArray[np.intp], keys: NDArray[np.uint64], file: Callable[[int], str]
) -> NDArray[np.intp]:
    """``place`` with files of equal keys in the order of their names, which no walk decides."""
    sorted_keys = keys[place]
    for i in np.flatnonzero(sorted_keys[1:] == sorted_keys[:-1]).tolist():
        if file(int(place[i])) > file(int(place[i + 1])):
            place[i], place[i + 1] = place[i + 1], place[i]
    return place
