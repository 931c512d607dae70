"""What is known of a segmentation network's weights beside the tensors and what its backbone's say: its decoder, its images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from dattrain.config.schema import Config
from dattrain.config.sections import SegmentationHead
from dattrain.config.values import as_pair


@dataclass(frozen=True)
class SegmentationCfg:
    """The decoder, and how images are prepared and evaluated: keys of ``task``, ``geometry`` and ``eval`` as in a recipe."""

    head: SegmentationHead = "upernet"
    norm: Literal["sync", "group", "batch"] = "sync"
    channels: int | None = None
    aux: bool = True
    """There is an auxiliary head (``task.aux_weight`` above 0)."""
    short_side: int = 512
    long_side: int = 2048
    mode: Literal["whole", "slide"] = "whole"
    crop: tuple[int, int] | None = None
    """The window of ``slide``, (height, width) in pixels."""
    stride: tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False


def segmentation_of(config: Config) -> SegmentationCfg | None:
    """That of a recipe; None where its task is another."""
    task, geometry, evaluation = config.task, config.geometry, config.eval
    if task.kind != "segmentation":
        return None
    return SegmentationCfg(
        head=cast(SegmentationHead, task.head),
        norm=task.norm,
        channels=task.channels,
        aux=task.aux_weight > 0,
        short_side=geometry.short_side,
        long_side=geometry.long_side,
        mode=evaluation.mode,
        crop=None if geometry.crop is None else as_pair(geometry.crop),
        stride=None if evaluation.stride is None else as_pair(evaluation.stride),
        scales=evaluation.scales,
        flip=evaluation.flip,
    )
