"""A detector over a data set: the evaluation of a training, by ``dattrain.tasks``, with the options of ``dattrain eval``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dattrain.config.schema import Config
from dattrain.data import detection_factory
from dattrain.data.annotations.detection import category_ids
from dattrain.errors import ConfigError, UserError
from dattrain.evaluation import inference
from dattrain.evaluation.dense import facts, opened, per_class, run_through
from dattrain.evaluation.options import Options
from dattrain.files import write_atomically
from dattrain.models.dense.detector import Detector
from dattrain.pretrained.preprocess import padded_size
from dattrain.pretrained.pretrained_cfg import PretrainedCfg, classes_of
from dattrain.tasks import coco_numbers
from dattrain.tasks.coco_ap import CocoAP
from dattrain.tasks.coco_numbers import ImageResult
from dattrain.urls import mask

BOUNDARY = "boundary_"
"""Before the names of the numbers by Boundary IoU."""


@dataclass(frozen=True)
class Pass:
    """One pass over a set.

    Attributes:
        metrics: of ``Task.evaluator``.
        predictions: what a report shows of it.
        speed: ``bad`` images, ``images_per_s`` and ``network_images_per_s``.
        results: of every image, on rank 0; empty elsewhere.
        category_ids: what the set's own file calls the network's classes, by number.
    """

    metrics: dict[str, float]
    predictions: dict[str, Any]
    speed: dict[str, Any]
    results: Sequence[ImageResult]
    category_ids: Sequence[int | None]


def evaluate(
    path: str | Path,
    model: Detector,
    cfg: PretrainedCfg,
    options: Options,
    device: torch.device,
    on_open: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """The report of ``evaluation.evaluate.Evaluation``; on ranks other than 0 without the metrics.

    COCO's twelve numbers in percent (``coco_numbers.NAMES``), those of masks under ``mask_`` and by Boundary IoU under ``boundary_``; a number
    that no object is of is missing. ``per_class`` is a row for each class that has objects or was found: ``class`` (its number),
    ``name``, ``objects``, ``found``, ``ap``, ``ap50``, ``ar`` and those of masks, None where it has no object.

    Raises:
        ConfigError: options of other networks, or that do not go together.
        UserError: images that cannot be read; no object in the set; ``options.predictions`` cannot be written.
    """
    config, spec = opened(path, cfg, options, "detection")
    if options.boundary and not model.has_masks:
        raise ConfigError(f"{path}: --boundary is of masks, and {config.task.head} gives boxes alone")
    coco_numbers.check_installed()
    size = padded_size(config.geometry.short_side, config.geometry.long_side, cfg)
    report = facts(path, model, cfg, config, size) | {
        "data": mask(spec),
        "max_detections": config.eval.max_detections,
        "score_threshold": config.eval.score_threshold,
        "device": str(device),
        "precision": options.precision,
    }
    if on_open:
        on_open(report)
    done = run(config, model, cfg, spec, device, options.precision)
    outlines = inference.ranks().on_first(lambda: _boundary(config, done) if options.boundary else {})
    if inference.rank_and_world()[0]:
        return report
    if options.predictions is not None:
        _write(Path(options.predictions), done)
    metrics = {**done.metrics, **outlines, **done.speed, "images": int(done.metrics["images"])}
    return report | metrics | {"per_class": per_class(done.predictions["classes"], cfg)}


def run(
    config: Config,
    model: Detector,
    cfg: PretrainedCfg,
    spec: str,
    device: torch.device,
    precision: str = "fp32",
) -> Pass:
    """One pass over ``spec``. Collective.

    Args:
        config: of detection; says how images are prepared, and which objects count.

    Raises:
        UserError: images that cannot be read; no object in the set.
    """
    rank, world = inference.rank_and_world()
    # No checkpoint is chosen here, so no metric has to be there: of a set with an object without mask the numbers of boxes.
    changes = {
        "data": config.data.model_copy(update={"val": spec, "labels": None}),
        "checkpoint": config.checkpoint.model_copy(update={"metric": "ap"}),
    }
    config = config.model_copy(update=changes)
    model.score_threshold, model.max_detections = config.eval.score_threshold, config.eval.max_detections
    evaluator = CocoAP(config, device, torch.float32)
    loader = detection_factory.eval_loader(config, classes_of(cfg), rank=rank, world=world, device=device)
    ids = category_ids(loader.dataset, cfg.num_classes)
    speed = run_through(loader, evaluator, model, spec=spec, device=device, precision=precision)
    ranks = inference.ranks()
    return Pass(evaluator.compute(ranks), dict(evaluator.predictions(ranks)), speed, evaluator.results, ids)


def _boundary(config: Config, done: Pass) -> dict[str, float]:
    """Numbers by Boundary IoU, in percent; none where the set has an object without mask."""
    if "mask_ap" not in done.metrics:
        return {}
    found = coco_numbers.numbers(
        done.results, config.model.num_classes, "boundary", config.eval.max_detections
    )
    return {f"{BOUNDARY}{name}": 100 * value for name, value in found.summary.items() if value == value}


def _write(path: Path, done: Pass) -> None:
    """COCO's results, as its own code and its servers take them."""
    rows = [row for image in done.results for row in image.results(done.category_ids)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(rows))
    except OSError as error:
        raise UserError(f"--predictions {path}: cannot be written ({error.strerror})") from error
