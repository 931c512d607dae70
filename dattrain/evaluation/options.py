"""What ``dattrain eval`` is told: options of all tasks, those that only some of them know, and what they make of a recipe."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from dattrain.config.schema import Config
from dattrain.errors import ConfigError
from dattrain.pretrained.pretrained_cfg import NETWORKS, TaskKind


@dataclass(frozen=True)
class Options:
    """What to evaluate on, and how; None takes what the run says. Messages name the options of ``dattrain eval``."""

    data: str | None = None
    """Shards, or a folder of images (``data.val`` of the run)."""
    test_set: str | None = None
    """``data`` is one of ``data.labels.TEST_SETS``, in the layout that it comes in."""
    img_size: int | tuple[int, int] | None = None
    """Pixels: a side, or (height, width)."""
    bias_table: Literal["resize", "sample"] | None = None
    """At another ``img_size``: as ``load_model`` (None: ``resize``)."""
    resize: Literal["shorter", "squash"] | None = None
    crop_pct: float | None = None
    """The crop's share of the resized side, above 0 and at most 1."""
    flip: bool | None = None
    """Average with the mirror image (None: not for classifiers; for segmentation as the run evaluates; not of detectors)."""
    crops: int = 1
    """1, or 5 to average over the corners and the centre."""
    scales: tuple[float, ...] | None = None
    """Segmentation: average over the image resized by these factors."""
    mode: Literal["whole", "slide"] | None = None
    """Segmentation: the whole image at once, or in windows of ``geometry.crop``."""
    max_detections: int | None = None
    """Detection: most objects of an image (``eval.max_detections``; LVIS has 300)."""
    score_threshold: float | None = None
    """Detection: least score of an object (``eval.score_threshold``; LVIS has .0001)."""
    boundary: bool = False
    """Detection: also COCO's numbers by Boundary IoU (Cheng et al., CVPR 2021), of masks."""
    predictions: str | None = None
    """Detection: a file to write the results to, in COCO's format and in the set's own category ids."""
    knn: int | None = None
    """Also the accuracy of so many nearest neighbours on frozen features."""
    linear_probe: bool = False
    """Also the accuracy of a linear classifier on frozen features."""
    train: str | None = None
    """Images for these two (``data.train`` of the run)."""
    train_limit: int | None = None
    """Use the first so many of them per rank."""
    ema: bool | None = None
    """Averaged weights (None: where there are any)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast's; ``fp32`` for none."""
    batch: int | None = None
    """Images at a time; dense prediction takes each alone."""
    workers: int | None = None
    """Decoding processes."""
    on_bad: Literal["error", "skip"] | None = None
    """An image that cannot be read is an error, or is left out and counted."""
    cache_dir: str | None = None
    """Where shards of URLs are kept."""
    keep_keys: bool = False
    """Also return the names of the images; of a classifier."""

    def __post_init__(self) -> None:
        """Refuse values that are not possible. Raises ConfigError."""
        if self.batch is not None and self.batch < 1:
            raise ConfigError(f"--batch {self.batch} must be at least 1")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ConfigError(f"--crop-pct {self.crop_pct} must be above 0 and at most 1")
        if self.knn is not None and self.knn < 1:
            raise ConfigError(f"--knn {self.knn} must be at least 1")
        if self.scales is not None and not (
            self.scales and all(0 < each <= _MOST_SCALE for each in self.scales)
        ):
            raise ConfigError(
                f"--scales {','.join(map(str, self.scales))}: one number above 0 and up to {_MOST_SCALE}, or several"
            )
        if self.max_detections is not None and self.max_detections < 1:
            raise ConfigError(f"--max-detections {self.max_detections} must be at least 1")
        if self.score_threshold is not None and not 0 <= self.score_threshold <= 1:
            raise ConfigError(f"--score-threshold {self.score_threshold:g}: a score is from 0 to 1")

    def check_task(self, task: TaskKind, path: object) -> None:
        """Refuse what other tasks alone know, and what lacks something; ``path`` is whose weights they are. Raises ConfigError."""
        usual = {each.name: each.default for each in fields(self)}
        for name, (option, tasks) in _OF_TASKS.items():
            if task not in tasks and getattr(self, name) != usual[name]:
                raise ConfigError(f"{path}: {option} has no meaning for {NETWORKS[task]}: leave it out")
        if self.test_set and not self.data:
            raise ConfigError(f"--labels {self.test_set} needs --data, the folder of that set")
        if task != "classification" and self.batch not in (None, 1):
            raise ConfigError(
                f"{path}: {NETWORKS[task]} evaluates each image alone, since padding would change what it sees: "
                f"leave --batch {self.batch} out"
            )


DEFAULTS = Options()
"""As the run says."""
_MOST_SCALE = 8
"""Of a size of evaluation: beyond it an image takes minutes and tells nothing."""
_CLASSIFICATION, _SEGMENTATION, _DETECTION = ("classification",), ("segmentation",), ("detection",)
_OF_TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "test_set": ("--labels", _CLASSIFICATION),
    "resize": ("--resize", _CLASSIFICATION),
    "crop_pct": ("--crop-pct", _CLASSIFICATION),
    "crops": ("--crops", _CLASSIFICATION),
    "knn": ("--knn", _CLASSIFICATION),
    "linear_probe": ("--linear-probe", _CLASSIFICATION),
    "train": ("--train", _CLASSIFICATION),
    "train_limit": ("--train-limit", _CLASSIFICATION),
    "flip": ("--flip", _CLASSIFICATION + _SEGMENTATION),
    "scales": ("--scales", _SEGMENTATION),
    "mode": ("--mode", _SEGMENTATION),
    "max_detections": ("--max-detections", _DETECTION),
    "score_threshold": ("--score-threshold", _DETECTION),
    "boundary": ("--boundary", _DETECTION),
    "predictions": ("--predictions", _DETECTION),
}
"""Fields that only some tasks know, as ``dattrain eval`` calls them, and these tasks."""


def adjusted(config: Config, options: Options) -> Config:
    """The run's settings, with what the options say of them.

    Raises:
        ConfigError: what does not go together, as windows without their size.
    """
    given: dict[str, dict[str, Any]] = {
        "eval": {
            "batch": options.batch,
            "scales": options.scales,
            "flip": options.flip if config.task.kind == "segmentation" else None,
            "mode": options.mode,
            "max_detections": options.max_detections,
            "score_threshold": options.score_threshold,
        },
        "data": {"workers": options.workers, "on_bad": options.on_bad, "cache_dir": options.cache_dir},
    }
    if options.mode == "whole" and config.eval.stride is not None:
        config = config.model_copy(update={"eval": config.eval.model_copy(update={"stride": None})})
    changed = config.model_copy(
        update={
            name: getattr(config, name).model_copy(
                update={key: value for key, value in values.items() if value is not None}
            )
            for name, values in given.items()
        }
    )
    if changed.eval.mode == "slide" and changed.geometry.crop is None:
        raise ConfigError("--mode slide needs the size of its windows, and geometry.crop of the run is null")
    return changed


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """``torch.autocast`` to ``bf16`` or ``fp16``; nothing for ``fp32``."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)
