"""What the evaluations of segmentation and detection have in common: what is evaluated, and one timed pass over it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dattrain.config.schema import Config
from dattrain.errors import ConfigError
from dattrain.evaluation import inference
from dattrain.evaluation.options import Options, adjusted, autocast
from dattrain.models import flops
from dattrain.pretrained import class_names
from dattrain.pretrained.pretrained_cfg import PretrainedCfg, TaskKind
from dattrain.pretrained.recipe_model import dense_recipe
from dattrain.pretrained.weights import config_of
from dattrain.runtime.progress import Progress
from dattrain.tasks.base import EvalLoader, Evaluator
from dattrain.urls import mask


def opened(path: str | Path, cfg: PretrainedCfg, options: Options, kind: TaskKind) -> tuple[Config, str]:
    """The recipe of a run or file with what ``options`` change of it, and the images to evaluate on.

    Raises:
        ConfigError: options of other networks, or that do not go together; nobody says which images.
    """
    options.check_task(kind, path)
    config = adjusted(config_of(path) or dense_recipe(cfg), options)
    spec = options.data or config.data.val
    if spec is None:
        raise ConfigError(f"{path} does not say which images to evaluate on (data.val): give --data")
    return config, spec


def facts(
    path: str | Path, model: nn.Module, cfg: PretrainedCfg, config: Config, padded: tuple[int, int]
) -> dict[str, Any]:
    """How a report begins; ``gflops`` are of an image of ``padded`` (height and width)."""
    return {
        "model": str(path),
        "task": config.task.kind,
        "name": f"{cfg.name} with {config.task.head}",
        "source": cfg.source,
        "img_size": [config.geometry.short_side, config.geometry.long_side],
        "classes": cfg.num_classes,
        "parameters": flops.parameters(model),
        "gflops": flops.flops(model, padded, cfg.in_chans) / 1e9,
    }


def run_through(
    loader: EvalLoader[Any],
    evaluator: Evaluator[Any],
    model: nn.Module,
    *,
    spec: str,
    device: torch.device,
    precision: str,
) -> dict[str, Any]:
    """Give ``evaluator`` every batch of ``loader`` and close that: ``bad`` images, ``images_per_s``, ``network_images_per_s``. Collective.

    Args:
        spec: what the loader reads, for the progress.
    """
    started, network, images, bad = time.perf_counter(), 0.0, 0, 0
    with (
        closing(loader),
        torch.inference_mode(),
        autocast(device, precision),
        Progress(mask(spec), "images", shown=inference.rank_and_world()[0] == 0) as progress,
    ):
        for number, batch in enumerate(loader, 1):
            before = inference.now(device)
            evaluator.update(model, batch, lockstep=False)
            network += inference.now(device) - before
            images, bad = images + len(batch.keys), bad + len(batch.bad)
            progress(number, len(loader))
    seconds = time.perf_counter() - started
    return {
        "bad": sum(inference.ranks().gather(bad)),
        "images_per_s": images / seconds,
        "network_images_per_s": images / max(network, 1e-9),
    }


def per_class(rows: Iterable[Mapping[str, Any]], cfg: PretrainedCfg) -> list[dict[str, Any]]:
    """Rows of classes with their names."""
    names = class_names.names(cfg.num_classes, cfg.labels, cfg.classes)
    return [{"class": row["class"], "name": names[row["class"]], **row} for row in rows]
