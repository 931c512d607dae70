"""Which task can learn from which set."""

from __future__ import annotations

from collections.abc import Collection

from dattrain.data.source.annotation_index import Annotations
from dattrain.data.source.sample import Dataset
from dattrain.errors import UserError

_HOLDS = {
    "none": "an image and at most one label each",
    "maps": "an image and a map of the classes of its pixels each",
    "instances": "an image and the objects in it each",
}
_TASKS = {"none": "classification", "maps": "segmentation", "instances": "segmentation"}
_NEEDED = {
    frozenset({"none"}): "images with a class each: a folder per class, or shards with labels",
    frozenset(
        {"maps", "instances"}
    ): "annotations: shards that `dattrain data pack --ade|--coco|--voc` wrote, an ADE20K-like folder "
    "(DIR/images/training, beside it DIR/annotations/training), a COCO JSON or a VOC folder",
    frozenset({"instances"}): "objects: shards that `dattrain data pack --coco` wrote, or a COCO JSON",
}
CLASSIFICATION: frozenset[Annotations] = frozenset({"none"})
SEGMENTATION: frozenset[Annotations] = frozenset({"maps", "instances"})
KINDS = {"classification": CLASSIFICATION, "segmentation": SEGMENTATION}
"""By ``task.kind``."""


def flaws(dataset: Dataset, task: str) -> list[str]:
    """What makes samples of a set bad for a task, as far as opening it tells: ``Dataset.flaws``, and objects without the mask that it needs."""
    found = list(dataset.flaws)
    if dataset.maskless and task == "segmentation":
        found.append(f"{dataset.name}: {dataset.maskless}; task.kind={task} learns from masks")
    return found


def check_kind(held: Annotations, wanted: Collection[Annotations], what: str, task: str) -> None:
    """Refuse a set that a task cannot learn from.

    Args:
        held: what its samples hold beside the image.
        wanted: ``CLASSIFICATION``, ``SEGMENTATION`` or another set of kinds.
        what: the setting and its value, as ``data.train=/sets/ade``, for messages.
        task: the value of ``task.kind``.

    Raises:
        UserError: the set holds annotations of another kind, or none.
    """
    if held not in wanted:
        needed = _NEEDED.get(frozenset(wanted), " or ".join(sorted(wanted)))
        raise UserError(
            f"{what}: its samples hold {_HOLDS[held]}, and task.kind={task} needs {needed}"
            + (f"; for this set, task.kind={_TASKS[held]}" if _TASKS[held] != task else "")
        )
