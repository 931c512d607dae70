"""What is known of a detector's weights beside the tensors and what its backbone's say: its heads, its images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from dattrain.config.schema import Config
from dattrain.config.sections import DetectionHead


@dataclass(frozen=True)
class DetectionCfg:
    """The heads, and how images are prepared and evaluated: keys of ``task``, ``geometry`` and ``eval`` as in a recipe."""

    head: DetectionHead = "mask_rcnn"
    norm: Literal["sync", "group", "batch"] = "sync"
    channels: int | None = None
    short_side: int = 800
    long_side: int = 1333
    pad_to: int = 32
    max_detections: int = 100
    score_threshold: float = 0.05


def detection_of(config: Config) -> DetectionCfg | None:
    """That of a recipe; None where its task is another."""
    task, geometry, evaluation = config.task, config.geometry, config.eval
    if task.kind != "detection":
        return None
    return DetectionCfg(
        head=cast(DetectionHead, task.head),  # as the schema has seen
        norm=task.norm,
        channels=task.channels,
        short_side=geometry.short_side,
        long_side=geometry.long_side,
        pad_to=geometry.pad_to,
        max_detections=evaluation.max_detections,
        score_threshold=evaluation.score_threshold,
    )
