"""PASCAL VOC as it is given out: a list of names in ``ImageSets/Segmentation`` says which images, and what lies beside it the rest.

``JPEGImages/NAME.jpg`` are the images, ``SegmentationClass/NAME.png`` maps with a palette: index 0 is the background, 255 void. Lists in
``ImageSets/Main`` are of images with boxes (``voc_objects``).
"""

from __future__ import annotations

import os
import re
from hashlib import sha256
from pathlib import Path

import numpy as np

from dattrain.data.annotations.annotated import AnnotatedFiles
from dattrain.data.annotations.map_folder import named_classes, read_map
from dattrain.data.classes import few
from dattrain.data.source.annotation_index import Annotations
from dattrain.data.source.files import explained, listing
from dattrain.errors import UserError

VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""Classes 0 to 20 (Everingham et al., IJCV 2010, in the order of the development kit's maps)."""
NAMES = "class_names.txt"
"""In the folder of a set with other classes (as labelme writes it): one name a line, the first is number 0 of the maps."""
MAPS, BOXES = os.path.join("ImageSets", "Segmentation"), os.path.join("ImageSets", "Main")
"""Folders of the lists of images with maps, and of those with boxes."""
IMAGES, XMLS, _SEGMENTED = "JPEGImages", "Annotations", "SegmentationClass"


def split_of(spec: str) -> bool:
    """Whether ``spec`` is a list of names in ``ImageSets/Segmentation`` or ``ImageSets/Main``.

    Raises:
        UserError: it is the folder that holds these; the lists in it are named.
    """
    path = Path(spec).absolute()
    if (path / IMAGES).is_dir() and ((path / _SEGMENTED).is_dir() or (path / XMLS).is_dir()):
        found = {inside: few(lists(path, inside)) for inside in (MAPS, BOXES)}
        has = "; ".join(f"{inside}: {names}" for inside, names in found.items() if names) or "none"
        example = os.path.join(spec, MAPS if (path / _SEGMENTED).is_dir() else BOXES, "train.txt")
        raise UserError(f"{spec}: is a VOC folder; name the list of one split, as {example} (it has {has})")
    return path.suffix == ".txt" and os.path.join(*path.parent.parts[-2:]) in (MAPS, BOXES)


def lists(folder: Path, inside: str) -> list[str]:
    """File names of the lists of a VOC folder, in ``MAPS`` or ``BOXES``; those that are of one class, as ``cat_train.txt``, last."""
    place = folder / inside
    found = [entry.name for entry in listing(place)] if place.is_dir() else []
    return sorted((name for name in found if name.endswith(".txt")), key=lambda name: ("_" in name, name))


def listed(path: str) -> list[str]:
    """The names in a list.

    Raises:
        UserError: no such list; a name comes twice; it is one that says of each image whether it has one class.
    """
    with explained(path):
        lines = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    stems = [line.strip() for line in lines if line.strip()]
    if stems and all(re.search(r"\s-?[01]$", stem) for stem in stems):
        raise UserError(
            f"{path}: says of each image whether it has one class ({stems[0]!r}); name the list of a split, as "
            f"{os.path.join(os.path.dirname(path), 'train.txt')}"
        )
    if len(set(stems)) < len(stems):
        twice = next(stem for stem in stems if stems.count(stem) > 1)
        raise UserError(f"{path}: names {twice!r} twice")
    return stems


class VocDataset(AnnotatedFiles):
    """The images that a list names, with the maps of their classes.

    Args:
        path: ``DIR/ImageSets/Segmentation/train.txt``.

    Raises:
        UserError: no such list, or it names nothing; a name comes twice.
    """

    annotations: Annotations = "maps"

    def __init__(self, path: str) -> None:
        top = Path(path).absolute().parents[2]
        stems = listed(path)
        self.maps = top / _SEGMENTED
        self.classes = named_classes(top / NAMES) if (top / NAMES).is_file() else list(VOC)
        super().__init__(path, top / IMAGES, [f"{stem}.jpg" for stem in stems], origin=f" (from {path})")
        there = {entry.name: entry.stat().st_size for entry in listing(self.maps)}
        sizes = [there.get(self._map(sample), -1) for sample in range(len(stems))]
        self._digest = sha256(np.asarray(sizes, dtype="<i8").tobytes()).hexdigest()
        images = {entry.name for entry in listing(self.root)}
        flaws = (
            ("are not in", self.root, sorted({f"{stem}.jpg" for stem in stems} - images)),
            (
                "have no map in",
                self.maps,
                [self._map(sample) for sample, size in enumerate(sizes) if size < 0],
            ),
        )
        self.flaws = tuple(
            f"{path}: {len(names):,} of its {len(stems):,} images {what} {place}: {few(names)}"
            for what, place, names in flaws
            if names
        )

    @property
    def annotation_digest(self) -> str:
        """Of the maps' sizes in bytes."""
        return self._digest

    def annotation(self, sample: int) -> bytes:
        """The map."""
        return read_map(self.maps / self._map(sample), self.root / self.file(sample))

    def _map(self, sample: int) -> str:
        return f"{os.path.splitext(self.file(sample))[0]}.png"
