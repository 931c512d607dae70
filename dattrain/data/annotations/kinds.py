"""Which task can learn from which set, and from which of its classes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dattrain.config.schema import Config
from dattrain.config.sections import DETECTORS
from dattrain.data.annotations.instances import BACKGROUND
from dattrain.data.classes import canonical
from dattrain.data.source.annotation_index import Annotations
from dattrain.data.source.sample import Dataset
from dattrain.errors import UserError

_HOLDS = {
    "none": "an image and at most one label each",
    "maps": "an image and a map of the classes of its pixels each",
    "instances": "an image and the objects in it each",
}
_TASKS = {"none": ("classification",), "maps": ("segmentation",), "instances": ("detection", "segmentation")}
_NEEDED = {
    frozenset({"none"}): "images with a class each: a folder per class, or shards with labels",
    frozenset(
        {"maps", "instances"}
    ): "annotations: shards that `dattrain data pack --ade|--coco|--voc` wrote, an ADE20K-like folder "
    "(DIR/images/training, beside it DIR/annotations/training), a COCO JSON or a VOC folder",
    frozenset(
        {"instances"}
    ): "objects: shards that `dattrain data pack --coco|--voc` wrote, a COCO JSON, or a list in VOC's "
    "ImageSets/Main",
}
CLASSIFICATION: frozenset[Annotations] = frozenset({"none"})
SEGMENTATION: frozenset[Annotations] = frozenset({"maps", "instances"})
DETECTION: frozenset[Annotations] = frozenset({"instances"})
KINDS = {"classification": CLASSIFICATION, "segmentation": SEGMENTATION, "detection": DETECTION}
"""By ``task.kind``."""


def needs_masks(task: str, head: str) -> bool:
    """Whether ``task.kind`` with ``task.head`` learns from the masks of objects."""
    return task == "segmentation" or (task == "detection" and "mask" in head)


def requires_masks(config: Config, split: str) -> bool:
    """Whether an object without a mask makes its sample of ``data.train`` or ``data.val`` a bad one.

    An evaluation of a detector leaves the numbers of masks out where it cannot compute them, unless ``checkpoint.metric`` is one.
    """
    task, metric = config.task, config.checkpoint.metric.removeprefix("ema_")
    optional = split == "val" and task.kind == "detection" and not metric.startswith("mask_")
    return needs_masks(task.kind, task.head) and not optional


def flaws(dataset: Dataset, task: str, masks: bool, metric: str = "") -> list[str]:
    """What makes samples of a set bad for a task, as far as opening it tells: ``Dataset.flaws``, and objects that it cannot use.

    These are objects without the mask that it needs, and in detection those of the background.

    Args:
        task: ``task.kind``.
        masks: whether an object needs one (``requires_masks``).
        metric: ``checkpoint.metric``, where that of an evaluation is what needs them.
    """
    found = list(dataset.flaws)
    if dataset.grounds and task == "detection":
        found.append(
            f"{dataset.name}: {dataset.grounds}; in detection the background is no class: remove these objects, or call the category otherwise"
        )
    if dataset.maskless and masks:
        boxes = " or ".join(head for head in DETECTORS if not needs_masks("detection", head))
        learns = (
            f"task.kind={task} learns from masks"
            if task == "segmentation"
            else "this task.head learns from masks"
        )
        needs = f"{learns}; task.kind=detection with task.head {boxes} needs boxes alone"
        if metric:
            needs = (
                f"checkpoint.metric={metric} is of masks; checkpoint.metric=ap is of boxes, and needs none"
            )
        found.append(f"{dataset.name}: {dataset.maskless}; {needs}")
    return found


def learned(names: Sequence[str], task: str) -> list[int]:
    """Indexes of the classes of a set, by their names, for which a network of that task has outputs.

    All of them, but for detection: what is background there is said by no output of its own among ``model.num_classes``.
    """
    return [i for i, name in enumerate(names) if task != "detection" or canonical(name) != BACKGROUND]


def background_hint(
    annotations: Annotations, names: Sequence[str] | None, num_classes: int, task: str
) -> str:
    """What to add to a message about as many names that are not ``num_classes``: that the background was counted, or was not."""
    if annotations != "instances" or names is None:
        return ""
    count = len(learned(names, "detection"))
    if task == "detection" and num_classes == count + 1:
        return ": detection has no class for the background"
    if task == "segmentation" and num_classes == count == len(names) - 1:
        return f": of segmentation, {BACKGROUND} is a class like the others"
    return ""


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
            + (f"; for this set, task.kind={' or '.join(_TASKS[held])}" if task not in _TASKS[held] else "")
        )
