"""What timm calls a pretrained config: what is known of a set of weights beside the tensors.

It is enough to build the network and to feed it, and travels in the metadata of weights files. Reading and writing the
tensors is in ``weights``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from dattrain.config.schema import Config
from dattrain.config.values import as_pair
from dattrain.data import labels
from dattrain.data.classes import Classes
from dattrain.errors import UserError
from dattrain.models.dat import DAT
from dattrain.models.deformable import Conventions
from dattrain.models.dense.backbone import create_backbone
from dattrain.models.dense.create_detector import create_detector, outs
from dattrain.models.dense.detector import Detector
from dattrain.models.dense.segmenter import Segmenter, create_segmenter
from dattrain.models.zoo import create, variant_of
from dattrain.pretrained.detection_cfg import DetectionCfg, detection_of
from dattrain.pretrained.segmentation_cfg import SegmentationCfg, segmentation_of

_SETTINGS = (
    "patch_size",
    "dims",
    "blocks",
    "heads",
    "groups",
    "strides",
    "offset_kernels",
    "sr_ratios",
    "shift",
    "neighborhood",
    "stem",
    "mlp",
    "local_perception",
    "mlp_ratio",
    "global_pool",
)
"""Attributes of ``DAT`` that are arguments of its constructor and shape the network, beside those of its windows."""
_USED_BY = {
    "groups": "D",
    "strides": "D",
    "offset_kernels": "D",
    "sr_ratios": "P",
    "neighborhood": "N",
    "shift": "S",
}
"""Kinds of block that a setting matters to."""

TaskKind = Literal["classification", "segmentation", "detection"]
FORMATS: dict[TaskKind, int] = {"classification": 1, "segmentation": 2, "detection": 3}
"""Of the metadata: every version reads a classifier's, and none may take another network's for one."""

Network = DAT | Segmenter | Detector
"""What ``load_model`` opens: an image classifier (or its backbone), a segmentation network, or a detector."""
NETWORKS: dict[TaskKind, str] = {
    "classification": "an image classifier",
    "segmentation": "a segmentation network",
    "detection": "a detector",
}
"""What the networks of a task are called in messages."""


@dataclass(frozen=True)
class PretrainedCfg:
    """What is known of a set of weights beside the tensors.

    ``name`` to ``in_chans`` and ``overrides`` are arguments of ``zoo.create``; ``mean``, ``std``, ``resize`` and
    ``crop_pct`` say how images are prepared; ``labels`` names a label set of ``data.labels``; ``classes`` holds a name
    per class, or nothing; ``source`` tells where the weights came from.

    ``segmentation`` is set for a segmentation network, ``detection`` for a detector. ``name`` and ``overrides`` are its backbone's
    then, ``img_size`` lays out windows and tables alone, and ``resize`` and ``crop_pct`` mean nothing.
    """

    name: str
    num_classes: int
    img_size: tuple[int, int]
    in_chans: int = 3
    overrides: Mapping[str, Any] | None = None
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resize: Literal["shorter", "squash"] = "shorter"
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    labels: str | None = None
    classes: tuple[str, ...] = ()
    source: str = ""
    segmentation: SegmentationCfg | None = None
    detection: DetectionCfg | None = None

    @property
    def task(self) -> TaskKind:
        """What the network is for, as ``task.kind`` of a recipe."""
        if self.detection is not None:
            return "detection"
        return "classification" if self.segmentation is None else "segmentation"

    @property
    def sides(self) -> tuple[int, int] | None:
        """Pixels that the shorter side of an image is resized to, and the longer one at most; None for a classifier."""
        dense = self.detection or self.segmentation
        return None if dense is None else (dense.short_side, dense.long_side)

    def to_json(self) -> str:
        """As kept in a file's metadata."""
        content = {
            key: value for key, value in asdict(self).items() if key not in _TASKS or value is not None
        }
        return json.dumps({"format": FORMATS[self.task], **content})

    @classmethod
    def from_json(cls, text: str) -> PretrainedCfg:
        """The reverse of ``to_json``. Raises ValueError for anything else."""
        content = json.loads(text)
        found = content.pop("format", None)
        task: TaskKind = next((key for key in _TASKS if key in content), "classification")
        if found != FORMATS[task]:
            raise ValueError(f"of format {found}, and {', '.join(map(str, FORMATS.values()))} are known")
        for key in ("img_size", "mean", "std", "classes"):
            content[key] = tuple(content[key])
        content["overrides"] = _tuples(content.get("overrides") or {})
        try:
            if task != "classification":
                content[task] = _TASKS[task](**_tuples(content[task]))
            return cls(**content)
        except TypeError as error:
            raise ValueError(str(error)) from None


_TASKS: dict[TaskKind, type[Any]] = {"segmentation": SegmentationCfg, "detection": DetectionCfg}
"""Fields that networks of one task alone have."""


def build(cfg: PretrainedCfg, *, meta: bool = False) -> Network:
    """The network that ``cfg`` describes, with fresh weights, or without any memory (``meta``).

    SyncBatchNorm of a decoder or of box heads is built as BatchNorm, which has the same parameters, does the same in evaluation mode, and runs on
    CPUs too.
    """
    overrides = _tuples(cfg.overrides or {})
    with torch.device("meta" if meta else "cpu"):
        if cfg.task == "classification":
            return create(
                cfg.name,
                num_classes=cfg.num_classes,
                img_size=cfg.img_size,
                in_chans=cfg.in_chans,
                **overrides,
            )
        made = {"img_size": cfg.img_size, "in_chans": cfg.in_chans, **overrides}
        if (detection := cfg.detection) is not None:
            return create_detector(
                create_backbone(cfg.name, outs=outs(detection.head), **made),
                detection.head,
                cfg.num_classes,
                norm="batch" if detection.norm == "sync" else detection.norm,
                channels=detection.channels,
                score_threshold=detection.score_threshold,
                max_detections=detection.max_detections,
            )
        dense = cfg.segmentation
        assert dense is not None
        return create_segmenter(
            create_backbone(cfg.name, **made),
            dense.head,
            cfg.num_classes,
            norm="batch" if dense.norm == "sync" else dense.norm,
            channels=dense.channels,
            aux=dense.aux,
        )


def cfg_of_recipe(config: Config, *, source: str = "") -> PretrainedCfg:
    """The pretrained config of a recipe's model."""
    model = config.model
    return PretrainedCfg(
        name=model.name,
        num_classes=model.num_classes,
        img_size=as_pair(model.img_size),
        in_chans=model.in_chans,
        overrides=dict(model.overrides),
        mean=config.augment.mean,
        std=config.augment.std,
        resize=config.eval.resize,
        crop_pct=config.eval.crop_pct,
        interpolation=config.augment.interpolation,
        labels=config.data.labels,
        source=source,
        segmentation=segmentation_of(config),
        detection=detection_of(config),
    )


def cfg_of_model(model: DAT, **known: Any) -> PretrainedCfg:
    """The pretrained config of a model: the variant nearest to it, and as overrides what differs. ``known`` are other fields."""
    name = variant_of(model)
    if name is None:
        name = "dat_pp_tiny" if any("N" in kinds for kinds in model.blocks) else "dat_tiny"
    with torch.device("meta"):
        usual = create(name, num_classes=model.num_classes, img_size=model.img_size, in_chans=model.in_chans)
    overrides = {
        key: getattr(model, key) for key in _SETTINGS if _effective(model, key) != _effective(usual, key)
    }
    overrides |= {
        key: getattr(model.conventions, key)
        for key in Conventions.__dataclass_fields__
        if getattr(model.conventions, key) != getattr(usual.conventions, key)
    }
    # Two settings give windows: one of them tells what the variant does not do by itself.
    if _windows(model) != _windows(usual):
        key = "window_divisor" if model.window_size is None else "window_size"
        overrides[key] = getattr(model, key)
    return PretrainedCfg(name, model.num_classes, model.img_size, model.in_chans, overrides, **known)


def classes_of(cfg: PretrainedCfg) -> Classes:
    """The classes of a network's outputs, as its pretrained config tells them: by name, or by its label set."""
    names = cfg.classes
    if len(names) != cfg.num_classes and cfg.labels is not None:
        try:
            names = labels.label_set(cfg.labels, classes=cfg.num_classes).synsets
        except UserError:  # winter21 without its file
            names = ()
    return Classes(cfg.num_classes, tuple(names) if len(names) == cfg.num_classes else (), "the network")


def differences(model: DAT, other: DAT) -> list[str]:
    """Settings in which two networks are laid out otherwise, by their names in ``DAT``; empty where they are the same."""
    return [
        *(key for key in _SETTINGS if _effective(other, key) != _effective(model, key)),
        *(key for key in ("img_size", "conventions") if getattr(other, key) != getattr(model, key)),
        *(["window_size"] if _windows(other) != _windows(model) else []),
    ]


def _windows(model: DAT) -> list[tuple[int, int] | None]:
    """(height, width) of the windows of each stage, None for stages without window attention."""
    windows = zip(model.windows(model.img_size), model.blocks)
    return [window if set(kinds) & set("LS") else None for window, kinds in windows]


def _effective(model: DAT, key: str) -> Any:
    """A setting, with None for the stages that hold no block which it matters to."""
    letters = _USED_BY.get(key)
    value = getattr(model, key)
    if letters is None:
        return value
    stages = [bool(set(kinds) & set(letters)) for kinds in model.blocks]
    if isinstance(value, tuple):
        return [each if used else None for each, used in zip(value, stages)]
    return value if any(stages) else None


def _tuples(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in overrides.items()}
