"""A COCO JSON as a data set: ``instances_train2017.json`` and what labelling tools export in its form.

It is read once. The objects of each image become the bytes that ``instances`` reads, all in one array that forked workers share.
"""

from __future__ import annotations

import gc
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dattrain.data.annotations import instances, segmentations
from dattrain.data.annotations.annotated import AnnotatedFiles, Rows
from dattrain.data.annotations.instances import BACKGROUND, BACKGROUNDS
from dattrain.data.classes import few, unique
from dattrain.data.source.annotation_index import Annotations
from dattrain.data.source.files import explained, listing, read_file
from dattrain.data.source.index import to_json
from dattrain.data.source.sample import BadSample
from dattrain.errors import UserError
from dattrain.files import counted

_BBOX = "a bbox is x and y of its upper left corner, its width and its height, in pixels"


class CocoDataset(AnnotatedFiles):
    """Images of a COCO JSON with their objects; images without objects are samples too.

    ``classes`` are the background and the categories by their ids, which may begin anywhere and have gaps. Objects that
    training leaves out (``instances.degenerate``) are there, and counted in ``notes``.

    Args:
        path: of the JSON.
        images: folder of the images; None looks beside the JSON (``image_folder``).

    Raises:
        UserError: no such JSON; no folder with its images; an object of an image or category that it does not list.
    """

    annotations: Annotations = "instances"

    def __init__(self, path: str, images: str | None = None) -> None:
        content = _read(path)
        if not content["images"]:
            raise UserError(f"{path}: has no images; its 'images' are empty")
        rows = [_image(path, i, row) for i, row in enumerate(_list(path, content, "images"))]
        categories = _categories(path, _list(path, content, "categories"))
        self.classes = list(categories.names)
        self.category_ids = categories.ids
        self.grounds = _grounds(_list(path, content, "annotations"), categories)
        files = [str(row["file_name"]) for row in rows]
        _check_once(path, [row["id"] for row in rows], "id")
        _check_once(path, files, "file_name")
        root = image_folder(path, files, images)
        found = _list(path, content, "annotations")
        # An object that is there twice would lie under itself, and be void as a map.
        own = [one["id"] for one in found if isinstance(one, dict) and isinstance(one.get("id"), (int, str))]
        _check_once(path, own, "id", "annotations")
        objects, notes, self.maskless = _objects(path, found, rows, categories)
        del content, found, own
        if lost := _missing(root, files):
            self.flaws = (
                f"{path}: {len(lost):,} of its {len(files):,} images are not in {root}: {few(lost)}",
            )
        super().__init__(path, root, files, origin=f" (from {path})")
        # Objects are let go of as they become bytes: of a large file they are most of what is in memory.
        self.used = {0, *(one["class"] for each in objects.values() for one in each)}
        self._rows = Rows(_row(rows[i], objects.pop(rows[i]["id"], [])) for i in self.place.tolist())
        sizes = [size if (size := instances.size_in(rows[i])) else (0, 0) for i in self.place.tolist()]
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._digest = sha256(self._rows.bytes.data).hexdigest()
        self.notes = tuple(notes)

    @property
    def annotation_digest(self) -> str:
        """Of all annotations, in order."""
        return self._digest

    def image_size(self, shard: int, sample: int) -> tuple[int, int]:
        """See ``Dataset.image_size``; as the JSON says."""
        return int(self._sizes[sample, 0]), int(self._sizes[sample, 1])

    def annotation(self, sample: int) -> bytes:
        """JSON of the objects of an image."""
        return self._rows[sample]


def image_folder(path: str, files: Sequence[str], images: str | None) -> Path:
    """The folder that holds the images of a JSON.

    Without ``images`` it is looked for beside the JSON and one level above: the folder that the JSON is named after
    (``instances_train2017.json``: ``train2017``), alone or in ``images``; ``images``; the JSON's own.

    Raises:
        UserError: none of these holds any of the first images; all are named.
    """
    here = Path(path).absolute().parent
    if images is not None:
        places = [Path(images)]
    else:
        stem = Path(path).stem
        after = re.sub(r"^[^_]*_", "", stem) if "_" in stem else stem
        tops = (here, here.parent)
        places = [top / name for name in dict.fromkeys((after, stem)) for top in tops if name]
        places += [top / "images" / name for name in dict.fromkeys((after, stem)) for top in tops if name]
        places += [top / "images" for top in tops] + [here]
    some = [*files[:50], *files[-50:]]
    best = max(places, key=lambda place: sum((place / file).is_file() for file in some))
    if not any((best / file).is_file() for file in some):
        raise UserError(
            f"{path}: its images ({few(files)}) are in none of {', '.join(map(str, places))}; "
            + (
                "name the folder that they are in"
                if images
                else "move them to one of these, or pack with --images DIR"
            )
        )
    return best


class _Categories(NamedTuple):
    names: Sequence[str]
    """Of the classes, the background first."""
    of_id: Mapping[Any, int]
    """Class by category id."""
    ids: Sequence[int | None]
    """``Dataset.category_ids``."""


def _read(path: str) -> dict[str, Any]:
    with explained(path):
        data = read_file(path)
    # Millions of small objects, none of them garbage: looking through them again and again doubles the time.
    enabled = gc.isenabled()
    gc.disable()
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: does not parse as JSON ({error})") from error
    finally:
        if enabled:
            gc.enable()
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= content.keys():
        keys = few(list(content)) if isinstance(content, dict) else type(content).__name__
        raise UserError(
            f"{path}: is no COCO JSON of objects: it has {keys}; `images`, `annotations` and `categories` are needed"
        )
    return content


def _list(path: str, content: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    rows = content[name]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: its {name!r} are no list of objects; a COCO JSON has one")
    return rows


def _image(path: str, number: int, row: dict[str, Any]) -> dict[str, Any]:
    file, own = row.get("file_name"), instances.whole(row.get("id"))
    if not isinstance(own, (int, str)) or not isinstance(file, str) or not file:
        raise UserError(
            f"{path}: image {number} has id {own!r} and file_name {file!r}; both are needed, and the id is a whole number or a text"
        )
    if os.path.isabs(file) or ".." in file.replace("\\", "/").split("/"):
        raise UserError(
            f"{path}: image {own} has the file_name {file!r}; a path below the folder of the images is needed"
        )
    size = {side: instances.whole(row.get(side)) for side in ("height", "width")}
    if any(size.values()) and instances.size_in(size) is None:
        raise UserError(
            f"{path}: image {own} has height {size['height']!r} and width {size['width']!r}; whole numbers of pixels are right, or neither"
        )
    return {**row, **size, "id": own}


def _categories(path: str, rows: Sequence[Mapping[str, Any]]) -> _Categories:
    for row in rows:
        if (
            not isinstance(row.get("id"), int)
            or not isinstance(row.get("name"), str)
            or not row["name"].strip()
        ):
            raise UserError(f"{path}: has the category {dict(row)!r}; each needs an integer id and a name")
    _check_once(path, [row["id"] for row in rows], "id", "categories")
    rows = sorted(rows, key=lambda row: row["id"])
    grounds = [row for row in rows if row["name"].strip().lower() in BACKGROUNDS]
    others = [row for row in rows if row not in grounds]
    if not others:
        raise UserError(f"{path}: lists no categories of objects")
    if len(grounds) > 1:
        raise UserError(f"{path}: has {len(grounds)} categories of the background; it must have one at most")
    names = unique([BACKGROUND, *(row["name"] for row in others)], path)
    index = {row["id"]: i + 1 for i, row in enumerate(others)}
    of_id = {**index, **{row["id"]: 0 for row in grounds}}
    return _Categories(names, of_id, [None, *(row["id"] for row in others)])


def _objects(
    path: str, found: Sequence[dict[str, Any]], images: Sequence[Mapping[str, Any]], categories: _Categories
) -> tuple[dict[Any, list[dict[str, Any]]], list[str], str]:
    """Objects by image id as samples hold them; what is to be told of them; and ``Dataset.maskless``."""
    sizes = {row["id"]: instances.size_in(row) for row in images}
    kept: dict[Any, list[dict[str, Any]]] = {}
    odd: Counter[str] = Counter()
    first: dict[str, str] = {}
    usable = False
    learned: set[Any] = set()
    boxes, first_box, beyond = 0, "", 0
    for number, one in enumerate(found):
        where = f"annotation {one.get('id', f'number {number}')}"
        image = one.get("image_id")
        if not isinstance(image, (int, float, str)) or image not in sizes:
            raise UserError(f"{path}: {where} is of image {image!r}, which its images do not list")
        category = one.get("category_id")
        if not isinstance(category, (int, float, str)) or category not in categories.of_id:
            raise UserError(
                f"{path}: {where} of image {image} has category_id {category!r}; its categories are "
                f"{few([f'{key} ({categories.names[i]})' for key, i in categories.of_id.items()])}"
            )
        where = f"{where} of image {image}"
        why, kept_as = _kept(one, sizes[image], categories.of_id[category], f"{path}: {where}")
        kept.setdefault(image, []).append(kept_as)
        beyond += _ends_beyond(kept_as["bbox"], sizes[image])
        if why:
            odd[why] += 1
            first.setdefault(why, where)
            continue
        usable = True
        if not kept_as["iscrowd"] and "ignore" not in kept_as:
            learned.add(image)
        if "segmentation" not in kept_as:
            boxes, first_box = boxes + 1, first_box or where
    if not usable:
        raise UserError(f"{path}: has no object to learn from: {_nothing(found, odd)}")
    empty = len(images) - len(learned)
    notes = [
        f"{path}: {counted(count, 'object')} with {why} ({first[why]}): {instances.UNLEARNED}"
        for why, count in odd.most_common()
    ]
    if 2 * beyond > len(found):
        notes.append(
            f"{path}: of {len(found):,} boxes {beyond:,} end beyond their image, as where x1, y1, x2, y2 are written; {_BBOX}"
        )
    if empty:
        notes.append(
            f"{path}: {empty:,} of its {len(images):,} images {'has' if empty == 1 else 'have'} no objects that are learned from"
        )
    return kept, notes, instances.maskless(boxes, first_box)


def _ends_beyond(box: Sequence[float], size: tuple[int, int] | None) -> bool:
    x, y, width, height = box
    return size is not None and (x + width > size[1] + 1 or y + height > size[0] + 1)


def _nothing(found: Sequence[Mapping[str, Any]], odd: Mapping[str, int]) -> str:
    """Why none of the objects that were found is one."""
    if not found:
        return "its 'annotations' are empty"
    if all(0 <= x < 2 for one in found for x in one.get("bbox", [-1])):
        return f"its boxes look like shares of the image's sides (one is {found[0]['bbox']}); {_BBOX}"
    return f"of its {counted(len(found), 'object')} " + " and ".join(
        f"{count:,} {'has' if count == 1 else 'have'} {why}" for why, count in odd.items()
    )


def _grounds(found: Sequence[Mapping[str, Any]], categories: _Categories) -> str:
    """``Dataset.grounds``."""
    ids = [key for key, index in categories.of_id.items() if index == 0]
    own = [one for one in found if one.get("category_id") in ids]
    if not own:
        return ""
    one = own[0]
    what = f"annotation {one.get('id')} of image {one.get('image_id')}"
    return (
        f"{counted(len(own), 'object')} of the category {BACKGROUND} (id {', '.join(map(str, ids))}): {what}"
    )


def _kept(
    one: dict[str, Any], size: tuple[int, int] | None, index: int, where: str
) -> tuple[str, dict[str, Any]]:
    """Why training leaves an object out, and the object as a sample holds it."""
    try:
        segmentation = segmentations.read_segmentation(one.get("segmentation"), where)
        if segmentation is not None:
            segmentation = segmentations.stored(segmentation, where)
        box = instances.box_said(one, segmentation, where)
        crowd, ignored = (instances.flag(one, name, where) for name in ("iscrowd", "ignore"))
    except BadSample as error:
        raise UserError(f"{error}; correct it, or remove it") from error
    area = instances.area_said(one, segmentation, box)
    kept = {
        "class": index,
        "bbox": one.get("bbox", list(box)),
        "area": area,
        "iscrowd": int(crowd),
    }
    if "id" in one:
        kept["id"] = one["id"]
    if ignored:
        kept["ignore"] = 1
    if segmentation is not None:
        kept["segmentation"] = segmentation
    return instances.degenerate(box, area, segmentation, size), kept


def _row(image: Mapping[str, Any], objects: Sequence[Mapping[str, Any]]) -> bytes:
    """The annotation of an image, as ``instances`` reads it."""
    return to_json(
        {
            "filename": image["file_name"],
            "image_id": image["id"],
            "height": image.get("height"),
            "width": image.get("width"),
            "annotations": objects,
        }
    )


def _missing(root: Path, files: Sequence[str]) -> list[str]:
    """Images that are not there, by a listing of their folders."""
    there: dict[str, frozenset[str]] = {}

    def names(folder: str) -> frozenset[str]:
        if folder not in there:
            place = root / folder
            there[folder] = (
                frozenset(entry.name for entry in listing(place)) if place.is_dir() else frozenset()
            )
        return there[folder]

    return [file for file in files if os.path.basename(file) not in names(os.path.dirname(file))]


def _check_once(path: str, values: Sequence[Any], what: str, of: str = "images") -> None:
    """Raise UserError where two have the same."""
    if len(set(values)) < len(values):
        (value, _), *_ = Counter(values).most_common(1)
        raise UserError(f"{path}: two of its {of} have the {what} {value!r}; each must have its own")
