"""From a recipe to its network without memory (names, shapes and what is trained), and from weights without a run to a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dattrain.config.schema import Config
from dattrain.config.values import as_pair
from dattrain.engine.optim import freeze_backbone
from dattrain.errors import UserError
from dattrain.pretrained.detection_cfg import DetectionCfg
from dattrain.pretrained.pretrained_cfg import Network, PretrainedCfg, build, cfg_of_recipe
from dattrain.pretrained.segmentation_cfg import SegmentationCfg


def network(config: Config, img_size: int | Sequence[int]) -> Network:
    """The recipe's model laid out for ``img_size``, on the meta device, frozen as the recipe says."""
    net = build(replace(cfg_of_recipe(config), img_size=as_pair(img_size)), meta=True)
    if config.optim.freeze_backbone:
        freeze_backbone(net)
    return net


def dense_recipe(cfg: PretrainedCfg) -> Config:
    """A recipe whose network, images and evaluation are those of a segmentation network's or a detector's weights without a run.

    Raises:
        UserError: settings that no recipe can have, so that the file was written by something else.
    """
    off = dict.fromkeys(("color_jitter", "mixup", "cutmix", "erase_prob", "label_smoothing"), 0)
    sections = {
        "model": {
            "name": cfg.name, "img_size": cfg.img_size, "num_classes": cfg.num_classes, "in_chans": cfg.in_chans,
            "overrides": cfg.overrides or {},
        },
        "augment": {
            **off, "randaugment": None, "mean": cfg.mean, "std": cfg.std, "interpolation": cfg.interpolation,
        },
        **(_of_segmentation(cfg.segmentation) if cfg.segmentation else _of_detection(cfg.detection)),
    }  # fmt: skip
    try:
        return Config.model_validate(sections)
    except ValueError as error:
        raise UserError(
            f"{cfg.source or cfg.name}: no recipe can have what its metadata says: {error}"
        ) from None


def _of_segmentation(dense: SegmentationCfg) -> dict[str, Any]:
    return {
        "task": {
            "kind": "segmentation", "head": dense.head, "norm": dense.norm, "channels": dense.channels,
            **({} if dense.aux else {"aux_weight": 0}),
        },
        "geometry": {"short_side": dense.short_side, "long_side": dense.long_side, "crop": dense.crop},
        "eval": {
            "batch": 1, "mode": dense.mode, "stride": dense.stride, "scales": dense.scales, "flip": dense.flip,
        },
        "checkpoint": {"metric": "miou"},
    }  # fmt: skip


def _of_detection(dense: DetectionCfg | None) -> dict[str, Any]:
    assert dense is not None
    return {
        "task": {
            "kind": "detection", "head": dense.head, "norm": dense.norm, "channels": dense.channels,
        },
        "geometry": {
            "short_side": dense.short_side, "long_side": dense.long_side, "crop": None, "pad_to": dense.pad_to,
        },
        "eval": {
            "batch": 1, "max_detections": dense.max_detections, "score_threshold": dense.score_threshold,
        },
        "checkpoint": {"metric": "ap"},
    }  # fmt: skip
