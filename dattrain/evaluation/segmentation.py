"""A segmentation network over a data set: the evaluation of a training, by ``dattrain.tasks``, with the options of ``dattrain eval``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dattrain.config.schema import Config
from dattrain.evaluation import inference
from dattrain.evaluation.dense import facts, opened, per_class, run_through
from dattrain.evaluation.options import Options
from dattrain.models.dense.segmenter import Segmenter
from dattrain.pretrained.pretrained_cfg import PretrainedCfg, classes_of
from dattrain.tasks.create import create_task
from dattrain.urls import mask


def evaluate(
    path: str | Path,
    model: Segmenter,
    cfg: PretrainedCfg,
    options: Options,
    device: torch.device,
    on_open: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """The report of ``evaluation.evaluate.Evaluation``; on ranks other than 0 without the metrics.

    ``per_class`` is a row for each class that is in the truth or in the predictions: ``class`` (its number), ``name``, ``pixels`` of
    the truth, ``predicted`` of them, ``iou`` and ``accuracy`` in percent, the latter None where the truth has none of it.

    Raises:
        ConfigError: options of classifiers, or that do not go together.
        UserError: images that cannot be read; no pixel has a label.
    """
    config, spec = opened(path, cfg, options, "segmentation")
    geometry, how = config.geometry, config.eval
    report = facts(path, model, cfg, config, (geometry.short_side, geometry.long_side)) | {
        "data": mask(spec),
        "mode": how.mode,
        "scales": list(how.scales),
        "flip": how.flip,
        "device": str(device),
        "precision": options.precision,
    }
    if on_open:
        on_open(report)
    metrics, found, speed = run(config, model, cfg, spec, device, options.precision)
    if inference.rank_and_world()[0]:
        return report
    counted = {"images": int(metrics["images"]), "per_class": per_class(found["classes"], cfg)}
    return report | metrics | speed | counted


def run(
    config: Config,
    model: Segmenter,
    cfg: PretrainedCfg,
    spec: str,
    device: torch.device,
    precision: str = "fp32",
) -> tuple[dict[str, float], dict[str, Any], dict[str, Any]]:
    """One pass over ``spec``: the metrics of ``Task.evaluator``, its predictions, and ``bad`` images and speed. Collective.

    Args:
        config: of segmentation; says how images are prepared and evaluated.

    Raises:
        UserError: images that cannot be read; no pixel has a label.
    """
    rank, world = inference.rank_and_world()
    config = config.model_copy(update={"data": config.data.model_copy(update={"val": spec, "labels": None})})
    task = create_task(config)
    evaluator = task.evaluator(device, torch.float32)
    loader = task.eval_loader(
        classes_of(cfg), rank=rank, world=world, device=device, img_size=config.model.img_size
    )
    speed = run_through(loader, evaluator, model, spec=spec, device=device, precision=precision)
    ranks = inference.ranks()
    return evaluator.compute(ranks), dict(evaluator.predictions(ranks)), speed
