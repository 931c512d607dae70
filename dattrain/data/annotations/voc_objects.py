"""The boxes of PASCAL VOC, and of what labelling tools export in its form: an XML file for each image, and a list of names.

A list in ``ImageSets/Main`` says which images: ``JPEGImages/NAME.jpg`` (or another format) and ``Annotations/NAME.xml``. Boxes count pixels
from 1 and have their last ones within them (``xmin`` 1 and ``xmax`` 500 are the whole of 500 columns), as the development kit says.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from dattrain.data.annotations import instances
from dattrain.data.annotations.annotated import AnnotatedFiles, Rows
from dattrain.data.annotations.instances import BACKGROUND, BACKGROUNDS
from dattrain.data.annotations.map_folder import named_classes
from dattrain.data.annotations.voc import BOXES, IMAGES, NAMES, XMLS, VocDataset, listed
from dattrain.data.classes import canonical, few, order, unique
from dattrain.data.decode.images import is_image_name
from dattrain.data.source.annotation_index import Annotations
from dattrain.data.source.files import explained, listing
from dattrain.data.source.index import to_json
from dattrain.data.source.sample import BadSample
from dattrain.errors import UserError
from dattrain.files import counted


def open_voc(path: str) -> VocDataset | VocObjects:
    """The set of a list for which ``voc.split_of`` holds: maps of ``ImageSets/Segmentation``, boxes of ``ImageSets/Main``."""
    main = Path(path).absolute().parent.name == Path(BOXES).name
    return VocObjects(path) if main else VocDataset(path)


class VocObjects(AnnotatedFiles):
    """The images that a list names, with the boxes in them; none has a mask.

    ``classes`` are the background and the names of ``class_names.txt``, else all that stand in ``Annotations``, in the order of the
    alphabet: of VOC itself its twenty, in its own order. Objects that are ``difficult`` are marked ``ignore``, as mmdetection's converter
    does: detection does not learn from them, and COCO's evaluation, which knows of crowds alone, takes them for objects like others (VOC's own
    leaves them out). Degenerate objects are left out, as of COCO; both are counted in ``notes``.

    Args:
        path: ``DIR/ImageSets/Main/train.txt``.

    Raises:
        UserError: no such list, or one of a single class; an object of a class that ``class_names.txt`` does not name, or without box.
    """

    annotations: Annotations = "instances"

    def __init__(self, path: str) -> None:
        top = Path(path).absolute().parents[2]
        stems = listed(path)
        self.xmls = top / XMLS
        pictures = {
            os.path.splitext(entry.name)[0]: entry.name
            for entry in sorted(listing(top / IMAGES), key=lambda entry: entry.name)
            if is_image_name(entry.name)
        }
        found, there, self._why = _read(self.xmls, stems)
        names = _names(top, found, there)
        self.classes = [BACKGROUND, *names]
        files = [pictures.get(stem, f"{stem}.jpg") for stem in stems]
        super().__init__(path, top / IMAGES, files, origin=f" (from {path})")
        index = {name: i + 1 for i, name in enumerate(names)}
        rows: list[dict[str, Any] | None] = []
        notes: Counter[str] = Counter()
        first: dict[str, str] = {}
        for stem in (stems[i] for i in self.place.tolist()):
            rows.append(None)
            if stem in found:
                where = str(self.xmls / f"{stem}.xml")
                rows[-1], odd = _row(found[stem], pictures.get(stem, f"{stem}.jpg"), stem, index, where)
                notes.update(odd)
                for why in odd:
                    first.setdefault(why, where)
        self._rows = Rows(b"" if row is None else to_json(row) for row in rows)
        sizes = [size if row and (size := instances.size_in(row)) else (0, 0) for row in rows]
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._digest = sha256(self._rows.bytes.data).hexdigest()
        boxes = [(len(row["annotations"]), row["filename"]) for row in rows if row and row["annotations"]]
        self.maskless = instances.maskless(sum(n for n, _ in boxes), f"in {boxes[0][1]}" if boxes else "")
        self.notes = tuple(
            f"{path}: {counted(count, 'object')} {why} ({first[why]})" for why, count in notes.most_common()
        )
        lost = sorted(stem for stem in stems if stem not in pictures)
        self.flaws = tuple(
            f"{path}: {len(missing):,} of its {len(stems):,} images {what}: {few(missing)}"
            for what, missing in (
                (f"are not in {self.root}", lost),
                (f"have no XML in {self.xmls} that can be read", list(self._why)),
            )
            if missing
        )

    @property
    def annotation_digest(self) -> str:
        """Of all annotations, in order."""
        return self._digest

    def image_size(self, shard: int, sample: int) -> tuple[int, int]:
        """See ``Dataset.image_size``; as the XML says."""
        return int(self._sizes[sample, 0]), int(self._sizes[sample, 1])

    def annotation(self, sample: int) -> bytes:
        """JSON of the objects of an image. Raises BadSample where it has no XML, or a damaged one."""
        found = self._rows[sample]
        if not found:
            stem = os.path.splitext(self.file(sample))[0]
            raise BadSample(f"{self.root / self.file(sample)}: its boxes cannot be read: {self._why[stem]}")
        return found


class _Object(NamedTuple):
    name: str
    box: tuple[float, ...] | None
    difficult: bool


class _Picture(NamedTuple):
    """What an XML says; height and width None where it says none."""

    height: int | None
    width: int | None
    objects: tuple[_Object, ...]


def _read(folder: Path, stems: Sequence[str]) -> tuple[dict[str, _Picture], dict[str, str], dict[str, str]]:
    """The XML files of ``stems`` in a folder; names of all objects there, each with a file of it; and why one cannot be read."""
    wanted, found = set(stems), {}
    names: dict[str, str] = {}
    why: dict[str, str] = {}
    for entry in sorted(listing(folder), key=lambda entry: entry.name):
        if not entry.name.endswith(".xml"):
            continue
        file, stem = folder / entry.name, entry.name.removesuffix(".xml")
        with explained(str(file)):
            data = file.read_bytes()
        try:
            picture = _parsed(data)
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            why[stem] = f"{file} does not parse as XML ({error})"
            continue
        for one in picture.objects:
            names.setdefault(one.name, str(file))
        if stem in wanted:
            found[stem] = picture
    return found, names, {x: why.get(x, f"there is no {folder / x}.xml") for x in stems if x not in found}


def _parsed(data: bytes) -> _Picture:
    """What an XML says. Parts of objects (a person's head) are no objects. Raises ParseError, ValueError, LookupError."""
    tree = ElementTree.fromstring(data)
    sides = [_number(tree.findtext(f"size/{side}")) for side in ("height", "width")]
    height, width = (int(side) if side is not None and side.is_integer() else None for side in sides)
    objects = []
    for one in tree.findall("object"):
        corners = [_number(one.findtext(f"bndbox/{edge}")) for edge in ("xmin", "ymin", "xmax", "ymax")]
        left, top, right, bottom = (math.nan if corner is None else corner for corner in corners)
        box = instances.read_box([left - 1, top - 1, right - left + 1, bottom - top + 1])
        name = canonical(one.findtext("name", ""))
        objects.append(_Object(name, box, bool(_number(one.findtext("difficult")))))
    return _Picture(height, width, tuple(objects))


def _names(top: Path, found: Mapping[str, _Picture], there: Mapping[str, str]) -> list[str]:
    """Classes of a set but the background, of the names that are ``there``."""
    said = top / NAMES
    if said.is_file():
        names = [name for name in named_classes(said) if name.lower() not in BACKGROUNDS]
        names = list(unique(names, str(said)))
        for name in (one.name for picture in found.values() for one in picture.objects):
            if name not in names:
                raise UserError(
                    f"{there[name]}: has an object called {name!r}, which {said} ({few(names)}) does not name"
                )
        return names
    if not there:
        raise UserError(f"{top / XMLS}: none of its XML files has an object; their names are the classes")
    for name, file in there.items():
        if not name or name.lower() in BACKGROUNDS:
            raise UserError(f"{file}: has an object called {name!r}; an object has the name of its class")
    return order(list(there))


def _row(
    picture: _Picture, file: str, stem: str, index: Mapping[str, int], where: str
) -> tuple[dict[str, Any], list[str]]:
    """The annotation of an image, as ``instances`` reads it; and what is odd with objects of it, in words."""
    row: dict[str, Any] = {
        "filename": file,
        "image_id": stem,
        "height": picture.height,
        "width": picture.width,
    }
    objects, odd = [], []
    for name, box, difficult in picture.objects:
        if box is None:
            raise UserError(
                f"{where}: its {name!r} has no bndbox of xmin, ymin, xmax and ymax; correct it, or remove it"
            )
        area = box[2] * box[3]
        if why := instances.degenerate(box, area, None, instances.size_in(row)):
            odd.append(f"with {why}: {instances.UNLEARNED}")
        kept: dict[str, Any] = {"class": index[name], "bbox": list(box), "area": area, "iscrowd": 0}
        if difficult:
            kept["ignore"] = 1
            odd.append("marked difficult, from which detection does not learn")
        objects.append(kept)
    return {**row, "annotations": objects}, odd


def _number(text: str | None) -> float | None:
    """A number of an XML; None for anything else."""
    if text is None or not re.fullmatch(r"\s*[+-]?\d{1,9}(\.\d*)?\s*", text):
        return None
    return float(text)
