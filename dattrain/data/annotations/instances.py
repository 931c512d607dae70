"""The objects of one image as a sample holds them: JSON, its fields named as COCO's are.

``{"image_id": 9, "height": 480, "width": 640, "annotations": [{"class": 51, "bbox": [x, y, width, height], "area": 120.5, "iscrowd": 0,
"segmentation": ...}]}``. ``class`` is an index of the set's classes, which begin with the background; ``bbox`` is in pixels, as given;
``segmentation`` is a list of polygons (x, y, x, y, ...), or COCO's run lengths, compressed: ``{"size": [height, width], "counts": "..."}``;
it is missing where there is a box alone. ``ignore`` marks what detection does not learn from. Shards that others wrote may say
``category_id`` for ``class``, and leave out ``area``, and ``bbox`` where there is a segmentation. Objects that training leaves out
(``degenerate``) are there, since COCO's own evaluation counts them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dattrain.data.annotations.segmentations import (
    FAR,
    Segmentation,
    area_of,
    box_of,
    check_size,
    mask,
    read_segmentation,
    stored,
)
from dattrain.data.source.index import MAX_LABEL, to_json
from dattrain.data.source.sample import BadSample
from dattrain.files import counted

BACKGROUND = "background"
"""Class 0 of a set of objects: that of the pixels of none, where it is segmented."""
BACKGROUNDS = frozenset({BACKGROUND, "_background_", "__background__"})
"""What tools call it, in small letters (labelme's category has the id 0)."""

UNLEARNED = "training leaves them out, an evaluation of detection counts them"
"""Said of objects that are degenerate."""


@dataclass(frozen=True)
class Instances:
    """N objects of an image.

    Attributes:
        boxes: N x 4 float64: x and y of the upper left corner, width, height, in pixels.
        classes: N int64, of the set's own.
        area: N float64, pixels; where the annotation says a number that number, even one that is no area.
        crowd: N bool, whether it stands for many objects that nobody told apart.
        segmentations: N, None for a box alone.
        size: height and width of the image that was annotated; None where nobody says.
        ignored: indexes of those that are marked not to be learned from.
    """

    boxes: NDArray[np.float64]
    classes: NDArray[np.int64]
    area: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    segmentations: tuple[Segmentation | None, ...]
    size: tuple[int, int] | None
    ignored: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.classes)

    def degenerate(self, size: tuple[int, int] | None) -> list[str]:
        """Of each object why training leaves it out, see ``degenerate``; of an image of that height and width."""
        rows = zip(self.boxes.tolist(), self.area.tolist(), self.segmentations)
        return [degenerate(box, area, segmentation, size) for box, area, segmentation in rows]


def parse(annotation: bytes, where: str) -> Instances:
    """The objects of ``Sample.annotation``.

    Raises:
        BadSample: no such JSON, or an object without box or class.
    """
    content = _content(annotation, where)
    objects = [
        _object(one, f"{where}: object {i} of its annotation") for i, one in enumerate(content["annotations"])
    ]
    return Instances(
        boxes=np.asarray([one.box for one in objects], dtype=np.float64).reshape(-1, 4),
        classes=np.asarray([one.class_index for one in objects], dtype=np.int64),
        area=np.asarray([one.area for one in objects], dtype=np.float64),
        crowd=np.asarray([one.crowd for one in objects], dtype=np.bool_),
        segmentations=tuple(one.segmentation for one in objects),
        size=size_in(content),
        ignored=frozenset(i for i, one in enumerate(objects) if one.ignored),
    )


def nothing() -> Instances:
    """No objects, of an image of any size."""
    return Instances(
        boxes=np.zeros((0, 4)),
        classes=np.zeros(0, dtype=np.int64),
        area=np.zeros(0),
        crowd=np.zeros(0, dtype=np.bool_),
        segmentations=(),
        size=None,
    )


def maskless(count: int, first: str) -> str:
    """``Dataset.maskless`` of as many objects, of which ``first`` is one."""
    return f"{counted(count, 'object')} with a box and no mask: {first}" if count else ""


def size_of(annotation: bytes) -> tuple[int, int] | None:
    """``Instances.size``, without a look at the objects; None too where it does not parse."""
    try:
        return size_in(json.loads(annotation))
    except (ValueError, RecursionError):
        return None


def is_annotation(content: object) -> bool:
    """Whether the content of a ``.json`` is one of objects: it has a list of ``annotations`` with boxes or masks, maybe empty."""
    objects = content.get("annotations") if isinstance(content, dict) else None
    return isinstance(objects, list) and all(
        isinstance(one, dict) and ("bbox" in one or "segmentation" in one) for one in objects
    )


def renumbered(
    annotation: bytes, numbers: NDArray[np.int64] | None, also: Mapping[str, Any], where: str
) -> bytes:
    """The JSON with other class numbers, masks in the forms that are kept, and the fields of ``also``. Raises BadSample."""
    content = _content(annotation, where)
    objects = []
    for i, one in enumerate(content["annotations"]):
        what = f"{where}: object {i} of its annotation"
        found = _object(one, what)
        kept = {key: value for key, value in one.items() if key != "category_id"}
        kept["class"] = found.class_index if numbers is None else _numbered(found.class_index, numbers, what)
        if found.segmentation is not None:
            kept["segmentation"] = stored(found.segmentation, what)
        objects.append(kept)
    return to_json({**content, **also, "annotations": objects})


def check(
    annotation: bytes, size: tuple[int, int], numbers: NDArray[np.int64] | None, where: str
) -> Instances:
    """The objects of an image of that height and width, after a look at the size of each mask and, by ``numbers``, each class.

    Raises:
        BadSample: one does not fit.
    """
    found = parse(annotation, where)
    if found.size is not None and found.size != size:
        raise BadSample(
            f"{where}: its annotation has {found.size[1]} x {found.size[0]} pixels, its image {size[1]} x {size[0]}; both must be of "
            "one size"
        )
    for i, segmentation in enumerate(found.segmentations):
        what = f"{where}: object {i} of its annotation"
        if segmentation is not None:
            check_size(segmentation, size, what)
        if numbers is not None:
            _numbered(int(found.classes[i]), numbers, what)
    return found


def painted(
    found: Instances, size: tuple[int, int], numbers: NDArray[np.int64] | None, where: str, void: int
) -> NDArray[np.uint8]:
    """The class of each pixel, H x W: ``void`` where objects overlap and in crowds, class 0 (the background) where there is none.

    As in torchvision's reference for COCO (``references/segmentation/coco_utils.py``), but that its crowds are of their class, and that
    degenerate objects cover nothing.

    Raises:
        BadSample: an object without mask, or of a class that the set does not name.
    """
    places = [where, *(f"{where}: object {i} of its annotation" for i in range(len(found)))]
    table = [0, *found.classes.tolist()]
    if numbers is not None:
        table = [_numbered(number, numbers, place) for number, place in zip(table, places)]
    if max(table) >= void:
        raise BadSample(f"{where}: has class {max(table)}; a map holds numbers below {void}")
    out = np.full(size, table[0], dtype=np.uint8)
    seen = np.zeros(size, dtype=np.bool_)
    unclear = np.zeros(size, dtype=np.bool_)
    for i, (segmentation, why) in enumerate(zip(found.segmentations, found.degenerate(size))):
        what = places[i + 1]
        if why:
            continue
        if segmentation is None:
            raise BadSample(f"{what} has a box and no mask; segmentation learns from masks")
        pixels = mask(segmentation, size, what)
        unclear |= pixels if found.crowd[i] else pixels & seen
        seen |= pixels
        out[pixels] = table[i + 1]
    out[unclear] = void
    return out


@dataclass(frozen=True)
class _Object:
    box: tuple[float, ...]
    class_index: int
    area: float
    crowd: bool
    segmentation: Segmentation | None
    ignored: bool


def _content(annotation: bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(annotation)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"{where}: its annotation does not parse ({error})") from error
    if not is_annotation(content):
        raise BadSample(
            f"{where}: its annotation holds {annotation[:60]!r}; objects are a list of `annotations`, each with a bbox or segmentation"
        )
    assert isinstance(content, dict)
    return content


def size_in(content: object) -> tuple[int, int] | None:
    """``height`` and ``width`` in the content of a JSON; None where these are no numbers of pixels."""
    fields = content if isinstance(content, dict) else {}
    height, width = whole(fields.get("height")), whole(fields.get("width"))
    return (height, width) if type(height) is int and type(width) is int and min(height, width) > 0 else None


def whole(value: Any) -> Any:
    """A number like 640.0 as an int, which tools write it for; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _object(one: Mapping[str, Any], where: str) -> _Object:
    index = one.get("class", one.get("category_id"))
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index <= MAX_LABEL:
        raise BadSample(f"{where} has the class {index!r}, not a number from 0 on")
    segmentation = read_segmentation(one.get("segmentation"), where)
    box = box_said(one, segmentation, where)
    area = area_said(one, segmentation, box)
    crowd, ignored = (flag(one, name, where) for name in ("iscrowd", "ignore"))
    return _Object(box, index, float(area), crowd, segmentation, ignored)


def flag(one: Mapping[str, Any], name: str, where: str) -> bool:
    """A field of an object that is 0 or 1, also as text; missing or null it is 0. Raises BadSample."""
    value = one.get(name)
    if value not in (None, 0, 1, "0", "1"):
        raise BadSample(f"{where} has {name} {value!r}, neither 0 nor 1")
    return value in (1, "1")


def box_said(one: Mapping[str, Any], segmentation: Segmentation | None, where: str) -> tuple[float, ...]:
    """The box of an object: its ``bbox``; where it has none, the one around its segmentation. Raises BadSample."""
    box = read_box(one.get("bbox"))
    if box is None and segmentation is not None and "bbox" not in one:
        box = box_of(segmentation)
    if box is None:
        raise BadSample(f"{where} has the bbox {one.get('bbox')!r}, not x, y, width and height in pixels")
    return box


def area_said(one: Mapping[str, Any], segmentation: Segmentation | None, box: Sequence[float]) -> float:
    """Pixels of an object: its ``area``, where that is a number (any: COCO's own evaluation goes by it), else ``area_of``."""
    area = one.get("area")
    if isinstance(area, (int, float)) and not isinstance(area, bool) and abs(area) <= sys.float_info.max:
        return area
    return area_of(segmentation, box)


def read_box(box: object) -> tuple[float, ...] | None:
    """Four numbers of pixels, below ``FAR``, or None."""
    if not isinstance(box, (list, tuple)) or len(box) != 4:
        return None
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < FAR for x in box):
        return None
    return tuple(map(float, box))


def degenerate(
    box: Sequence[float], area: float, segmentation: Segmentation | None, size: tuple[int, int] | None
) -> str:
    """Why training leaves out an object, in words, as by mmdetection's ``CocoDataset``; empty where it does not.

    An area that is no positive number counts as none that is said: what has a box and a mask is an object.

    Args:
        box: x, y, width, height.
        area: pixels.
        size: height and width of the image; None where they are not known.
    """
    x, y, width, height = box
    if width < 0 or height < 0:
        return "a negative width or height"
    if width < 1 or height < 1:
        return "a side below one pixel"
    if not area > 0 and not area_of(segmentation, box) > 0:
        return "no area"
    if size is not None and (x + width <= 0 or y + height <= 0 or x >= size[1] or y >= size[0]):
        return "a box beyond their image"
    return ""


def _numbered(own: int, numbers: NDArray[np.int64], where: str) -> int:
    if not 0 <= own < len(numbers) or numbers[own] < 0:
        raise BadSample(
            f"{where} has class {own}, but there are {len(numbers)} classes (those of its set, else model.num_classes): 0 to "
            f"{len(numbers) - 1} are right"
        )
    return int(numbers[own])
