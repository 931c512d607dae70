"""What a folder of one's own images holds: its splits, classes and sizes, and what is held out where it has one split alone."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from statistics import median

from PIL import Image

from dattrain.data.classes import canonical, few
from dattrain.data.decode.images import is_image_name
from dattrain.data.source.files import listing, read_file
from dattrain.data.source.folders import OTHER_SPLITS, TRAINING, FolderDataset
from dattrain.data.source.shards import holds_shards
from dattrain.errors import UserError

HELD_OUT = 10
"""One of so many images of a class."""
_TESTS = frozenset({"test", "testing"})
_SAMPLED = 400
"""Files of a split whose headers are read."""
_COMPARED = 200_000
"""Files up to which copies of an image are looked for, by a stat of each."""


@dataclass(frozen=True)
class Own:
    """A folder of images as it was found. Paths of ``train`` and ``val`` are below ``train_root`` and ``val_root``, by class."""

    train_root: Path
    val_root: Path
    train: Mapping[str, Sequence[str]]
    val: Mapping[str, Sequence[str]]
    held_out: bool
    """Whether ``val`` was taken out of the folder of ``train``."""
    notes: tuple[str, ...]
    """What was left out, or looks odd: a line each."""
    widths: tuple[int, ...]
    """Of a sample of the images, in pixels."""
    heights: tuple[int, ...]
    unreadable: tuple[str, ...]
    """Of that sample: files that are no images, and why."""

    @property
    def side(self) -> int:
        """Median of the shorter sides."""
        return int(median(map(min, zip(self.widths, self.heights)))) if self.widths else 224


def _of_objects(coco: Path) -> str:
    return (
        f"{coco}: looks like COCO's JSON of objects, and --data is for folders of classes. A detector is trained with a recipe, as in "
        f"`dattrain train coco_mask_rcnn_dat_tiny_1x data.train={coco} data.val=OTHER.json model.num_classes=N init.from=WEIGHTS` "
        "(docs/dense.md)"
    )


def _coco_json(folder: Path) -> Path | None:
    """A COCO JSON where annotation tools and the data set itself put it: in the folder, or in ``annotations``."""
    for place in (folder, folder / "annotations"):
        if place.is_dir():
            for entry in listing(place):
                name = entry.name.lower()
                if name.endswith(".json") and (name.startswith("instances_") or name.endswith(".coco.json")):
                    return Path(entry.path)
    return None


def find(folder: Path, *, seed: int = 0) -> Own:
    """Look at ``folder``: one with ``train`` and ``val`` folders, or one of class folders, of which a tenth is held out.

    Args:
        seed: of the draw of what is held out.

    Raises:
        UserError: no folder, or one that holds objects (COCO's JSON), shards, no class folders, one class, or a validation set with other classes.
    """
    if folder.suffix.lower() == ".json" and folder.is_file():
        raise UserError(_of_objects(folder))
    notes: list[str] = []
    root = _descend(folder, notes)
    parts = {entry.name.lower(): Path(entry.path) for entry in listing(root) if entry.is_dir()}
    train = next((parts[name] for name in sorted(parts) if name in TRAINING), None)
    val = next((parts[name] for name in ("val", "valid", "validation", "dev") if name in parts), None)
    if train is None:
        train, val = root, None
    else:
        known = TRAINING | OTHER_SPLITS
        for name, path in sorted(parts.items()):
            if name in _TESTS:
                notes.append(f"{path}: left alone; `dattrain eval RUN --data {path}` tests on it")
            elif name not in known and not name.startswith("."):
                notes.append(f"{path}: left alone, it is neither train nor val")
    if (coco := _coco_json(train) or _coco_json(root)) is not None:
        raise UserError(_of_objects(coco))
    for path in filter(None, (train, val)):
        if holds_shards(str(path)):
            raise UserError(
                f"{path}: holds tar shards; --data looks at image folders. Name them in a recipe: data.train={path}"
            )
    if not any(entry.is_dir() for entry in listing(train)) and any(
        is_image_name(entry.name) for entry in listing(train)
    ):
        raise UserError(
            f"{train}: its images lie in it directly, and nothing says what they show; put those of each class into a folder of its own"
        )
    images = FolderDataset(str(train))
    files = images.by_class()
    notes += images.notes
    if len(files) < 2:
        raise UserError(
            f"{train}: has one class folder ({few(list(files))}); there is nothing to tell apart. A folder for each class is needed"
        )
    if val is None:
        kept, held, more = hold_out(train, files, seed)
        notes += more
        return Own(train, train, kept, held, True, tuple(notes), *_headers((train, kept), (train, held)))
    other = FolderDataset(str(val))
    notes += other.notes
    held = other.by_class()
    _check_classes(train, files, val, held, notes)
    return Own(train, val, files, held, False, tuple(notes), *_headers((train, files), (val, held)))


def hold_out(
    root: Path, files: Mapping[str, Sequence[str]], seed: int
) -> tuple[dict[str, list[str]], dict[str, list[str]], list[str]]:
    """Divide each class by the names of its files: what is trained on, what is held out, and what to tell.

    A tenth of each class, at least one image; a class of one image stays in training. An image and its copies are on one
    side. Which ones is a function of seed and name alone: an image that is added later moves few others.

    Raises:
        UserError: a class consists of copies of what is held out, or nothing can be held out.
    """
    first, notes = _copies(root, files)
    chosen: set[str] = set()
    for names in files.values():
        own = sorted(
            {first.get(name, name) for name in names} & set(names), key=lambda name: _drawn(seed, name)
        )
        if len(own) > 1:
            chosen.update(own[: max(1, round(len(own) / HELD_OUT))])
    kept, held = {}, {}
    for name, names in files.items():
        out = [file for file in names if first.get(file, file) in chosen]
        kept[name] = [file for file in names if first.get(file, file) not in chosen]
        if out:
            held[name] = out
        if not kept[name]:
            raise UserError(
                f"{root / name}: holds copies of images of other classes alone; an image has one class"
            )
    if not held:
        raise UserError(
            f"{root}: each class has one image, so none can be held out to evaluate on; add images, or a val folder beside train"
        )
    if single := [name for name in files if name not in held]:
        notes.append(
            f"{root}: {len(single)} class(es) with one image stay in training, and are not evaluated: {few(single)}"
        )
    return kept, held, notes


def _copies(root: Path, files: Mapping[str, Sequence[str]]) -> tuple[dict[str, str], list[str]]:
    """The first file, by name, that has a file's very bytes, for each that is a copy; and what to tell of them."""
    names = sorted(file for each in files.values() for file in each)
    if len(names) > _COMPARED:
        return {}, [f"{root}: copies of an image were not looked for among so many ({len(names):,})"]
    sizes: dict[int, list[str]] = defaultdict(list)
    for name in names:
        try:
            sizes[os.stat(root / name).st_size].append(name)
        except OSError:  # a link to nothing: whoever reads it says so
            continue
    first: dict[str, str] = {}
    seen: dict[bytes, str] = {}
    for alike in sizes.values():
        for name in alike if len(alike) > 1 else ():
            try:
                digest = blake2b(read_file(root / name), digest_size=16).digest()
            except OSError:
                continue
            other = seen.setdefault(digest, name)
            if other != name:
                first[name] = other
    if not first:
        return {}, []
    name, other = next(iter(first.items()))
    return first, [f"{root}: {len(first)} image(s) are copies of others, kept on one side: {name} is {other}"]


def _drawn(seed: int, name: str) -> bytes:
    return blake2b(f"{seed}/{name}".encode(errors="surrogateescape"), digest_size=16).digest()


def _descend(folder: Path, notes: list[str]) -> Path:
    """The folder itself, or the only one in it that holds others, as archives are often unpacked."""
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else f"no such folder (from {Path.cwd()})"
        raise UserError(
            f"--data {folder}: {what}; name one that holds train/ and val/, or a folder for each class"
        )
    root = folder.absolute()
    for _ in range(3):
        inside = [Path(e.path) for e in listing(root) if e.is_dir() and not e.name.startswith((".", "__"))]
        if len(inside) != 1 or not any(e.is_dir() for e in listing(inside[0])):
            break
        root = inside[0]
        notes.append(f"{folder}: its images are in {root}")
    return root


def _check_classes(
    train: Path, files: Mapping[str, object], val: Path, held: Mapping[str, object], notes: list[str]
) -> None:
    known, asked = {canonical(name) for name in files}, {canonical(name) for name in held}
    if strange := sorted(asked - known):
        raise UserError(
            f"{val}: {strange[0]!r} is no class of {train} ({few(sorted(known))}); {len(strange)} of its {len(asked)} classes "
            "are not. Both want the same class folders"
        )
    if missing := sorted(known - asked):
        notes.append(f"{val}: has no images of {len(missing)} class(es): {few(missing)}")


def _headers(
    *parts: tuple[Path, Mapping[str, Sequence[str]]],
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]:
    """Widths and heights of a sample, by the headers of its files; and which files have none.

    Args:
        parts: root and images by class.
    """
    widths, heights, broken = [], [], []
    for root, files in parts:
        names = [file for each in files.values() for file in each]
        for name in names[:: max(1, len(names) // _SAMPLED)]:
            size = _size(root / name)
            if isinstance(size, str):
                broken.append(f"{root / name} ({size})")
            else:
                widths.append(size[0])
                heights.append(size[1])
    return tuple(widths), tuple(heights), tuple(broken)


def _size(path: Path) -> tuple[int, int] | str:
    """Width and height, or why it is no image."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:  # Pillow raises what its formats raise
        return str(error).partition(" '")[0] or type(error).__name__
