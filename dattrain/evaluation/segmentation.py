"""A segmentation network over a data set: the evaluation of a training, by ``dattrain.tasks``, with the options of ``dattrain eval``."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from dattrain.config.schema import Config
from dattrain.errors import ConfigError
from dattrain.evaluation import inference
from dattrain.evaluation.options import Options, adjusted, autocast
from dattrain.models import flops
from dattrain.models.dense.segmenter import Segmenter
from dattrain.pretrained import class_names
from dattrain.pretrained.pretrained_cfg import PretrainedCfg, classes_of
from dattrain.pretrained.recipe_model import dense_recipe
from dattrain.pretrained.weights import config_of
from dattrain.runtime.progress import Progress
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
    options.check_task("segmentation", path)
    config = adjusted(config_of(path) or dense_recipe(cfg), options)
    spec = options.data or config.data.val
    if spec is None:
        raise ConfigError(f"{path} does not say which images to evaluate on (data.val): give --data")
    geometry, how = config.geometry, config.eval
    size = geometry.short_side, geometry.long_side
    report: dict[str, Any] = {
        "model": str(path),
        "task": "segmentation",
        "name": f"{cfg.name} with {config.task.head}",
        "source": cfg.source,
        "img_size": list(size),
        "classes": cfg.num_classes,
        "parameters": flops.parameters(model),
        "gflops": flops.flops(model, size, cfg.in_chans) / 1e9,
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
    names = class_names.names(cfg.num_classes, cfg.labels, cfg.classes)
    rows = [{"class": row["class"], "name": names[row["class"]], **row} for row in found["classes"]]
    return report | metrics | speed | {"images": int(metrics["images"]), "per_class": rows}


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
    started, network, images, bad = time.perf_counter(), 0.0, 0, 0
    with (
        closing(loader),
        torch.inference_mode(),
        autocast(device, precision),
        Progress(mask(spec), "images", shown=rank == 0) as progress,
    ):
        for number, batch in enumerate(loader, 1):
            before = inference.now(device)
            evaluator.update(model, batch, lockstep=False)
            network += inference.now(device) - before
            images, bad = images + len(batch.keys), bad + len(batch.bad)
            progress(number, len(loader))
    seconds = time.perf_counter() - started
    ranks = inference.ranks()
    speed = {
        "bad": sum(ranks.gather(bad)),
        "images_per_s": images / seconds,
        "network_images_per_s": images / max(network, 1e-9),
    }
    return evaluator.compute(ranks), dict(evaluator.predictions(ranks)), speed
