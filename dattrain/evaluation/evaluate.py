"""Evaluate one model over a data set: accuracy, calibration, speed and what its frozen features are worth.

Runs in one process, or in a process group, where each rank takes its part of the images and rank 0 has the results. The
loop over the images is in ``inference``, the metrics in ``metrics``, ImageNet's other test sets in ``test_sets``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dattrain.config.schema import Config
from dattrain.errors import ConfigError
from dattrain.evaluation import inference, metrics, probe, test_sets
from dattrain.models import flops
from dattrain.models.dat import DAT
from dattrain.pretrained import class_names
from dattrain.pretrained.pretrained_cfg import PretrainedCfg
from dattrain.pretrained.weights import config_of, load_model
from dattrain.runtime.environment import device_called
from dattrain.urls import mask


@dataclass(frozen=True)
class Options:
    """What to evaluate on, and how; None takes what the run says. Messages name the options of ``dattrain eval``."""

    data: str | None = None
    """Shards or an image folder (``data.val`` of the run)."""
    test_set: str | None = None
    """``data`` is one of ``data.labels.TEST_SETS``, in the layout that it comes in."""
    img_size: int | tuple[int, int] | None = None
    """Pixels: a side, or (height, width)."""
    bias_table: Literal["resize", "sample"] = "resize"
    """At another size: as ``load_model``."""
    resize: Literal["shorter", "squash"] | None = None
    crop_pct: float | None = None
    """The crop's share of the resized side, above 0 and at most 1."""
    flip: bool = False
    """Average with the mirror image."""
    crops: int = 1
    """1, or 5 to average over the corners and the centre."""
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
    """Images at a time."""
    workers: int | None = None
    """Decoding processes."""
    on_bad: Literal["error", "skip"] | None = None
    """An image that cannot be read is an error, or is left out and counted."""
    cache_dir: str | None = None
    """Where shards of URLs are kept."""
    keep_keys: bool = False
    """Also return the names of the images."""

    def __post_init__(self) -> None:
        """Refuse values that are not possible. Raises ConfigError."""
        if self.batch is not None and self.batch < 1:
            raise ConfigError(f"--batch {self.batch} must be at least 1")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ConfigError(f"--crop-pct {self.crop_pct} must be above 0 and at most 1")
        if self.knn is not None and self.knn < 1:
            raise ConfigError(f"--knn {self.knn} must be at least 1")
        if self.test_set and not self.data:
            raise ConfigError(f"--labels {self.test_set} needs --data, the folder of that set")


@dataclass(frozen=True)
class Evaluation:
    """What was found, on rank 0; on other ranks the metrics are left out.

    ``report`` holds plain values: the model (``parameters``, ``gflops``, ...), the data, and the metrics (``top1``, ``top5``
    in percent with ``top1_low`` and ``top1_high``, ``loss`` in nats, ``ece`` in percent, ``images_per_s``, ...). ``records``
    is a row per image (None for ImageNet-C, which is many sets); ``keys`` are the images' names where they were asked for.
    """

    report: dict[str, Any]
    cfg: PretrainedCfg
    records: metrics.Records | None = None
    keys: list[str] = field(default_factory=list)

    def class_names(self) -> list[str]:
        """A name per class, for people."""
        return class_names.names(self.cfg.num_classes, self.cfg.labels, self.cfg.classes)


def evaluate(
    path: str | Path,
    options: Options = Options(),
    *,
    device: str | torch.device | None = None,
    on_open: Callable[[dict[str, Any]], object] | None = None,
) -> Evaluation:
    """Evaluate the weights at ``path``.

    Args:
        path: a run folder, checkpoint or weights file, as ``load_model`` takes it.
        device: None takes a GPU where there is one.
        on_open: called with the report so far (model and data) before the images are read.

    Raises:
        ConfigError: options that do not go together, or a model without classification head.
        UserError: weights or images that cannot be read; no image has a label.
    """
    device = device_called(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, cfg = load_model(
        path, ema=options.ema, device=device, img_size=options.img_size, bias_table=options.bias_table
    )
    if not cfg.num_classes:
        raise ConfigError(f"{path}: has no classification head to evaluate")
    cfg = replace(cfg, resize=options.resize or cfg.resize, crop_pct=options.crop_pct or cfg.crop_pct)
    config = adjusted(config_of(path), options)
    spec = options.data or config.data.val
    if spec is None:
        raise ConfigError(f"{path} does not say which images to evaluate on (data.val): give --data")
    views = inference.Views(options.flip, options.crops)
    report: dict[str, Any] = {
        "model": str(path),
        "name": cfg.name,
        "source": cfg.source,
        "img_size": list(cfg.img_size),
        "classes": cfg.num_classes,
        "parameters": flops.parameters(model),
        "gflops": flops.flops(model, cfg.img_size, cfg.in_chans) / 1e9,
        "data": mask(spec),
        "views": (2 if options.flip else 1) * options.crops,
        "device": str(device),
        "precision": options.precision,
    }
    if on_open:
        on_open(report)
    results = []
    parts = test_sets.parts(options.test_set, spec, cfg)
    for part in parts:
        loader = inference.open_loader(config, cfg, part.path, views, device=device)
        with closing(loader), autocast(device, options.precision):
            results.append(
                inference.classify(
                    model,
                    cfg,
                    loader,
                    device=device,
                    views=views,
                    among=part.among,
                    keep_keys=options.keep_keys or options.test_set == "real",
                    title=part.name,
                )
            )
    probes = {}
    if options.knn is not None or options.linear_probe:
        probes = _probes(options, model, cfg, config, spec, device)
    if inference.rank_and_world()[0]:
        return Evaluation(report, cfg)
    if options.test_set == "imagenet-c":
        return Evaluation(report | _corruptions(parts, results), cfg)
    (result,) = results
    assert result.records is not None
    accepted = test_sets.real_answers(result.keys, cfg) if options.test_set == "real" else None
    report |= metrics.compute(result.records, accepted)
    report |= {
        "bad": result.bad,
        "images_per_s": result.images / result.seconds,
        "network_images_per_s": result.images / result.forward_seconds,
        **probes,
    }
    return Evaluation(report, cfg, result.records, result.keys)


def adjusted(config: Config | None, options: Options) -> Config:
    """The run's settings, with what the options say of them; the defaults where there is no run."""
    config = config or Config()
    batch = options.batch or config.eval.batch
    workers = config.data.workers if options.workers is None else options.workers
    on_bad = options.on_bad or config.data.on_bad
    cache_dir = options.cache_dir or config.data.cache_dir
    return config.model_copy(
        update={
            "eval": config.eval.model_copy(update={"batch": batch}),
            "data": config.data.model_copy(
                update={"workers": workers, "on_bad": on_bad, "cache_dir": cache_dir}
            ),
        }
    )


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """``torch.autocast`` to ``bf16`` or ``fp16``; nothing for ``fp32``."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def _corruptions(parts: Sequence[test_sets.Part], results: Sequence[inference.Result]) -> dict[str, Any]:
    """Top-1 of each corruption and mCE, in percent."""
    top1 = {
        part.name: metrics.top1_top5(result.records)[0]
        for part, result in zip(parts, results)
        if result.records is not None
    }
    rows = test_sets.corruption_table(top1)
    mean = sum(float(row["top1"]) for row in rows) / len(rows)
    return {"top1": mean, "corruptions": rows, "mce": test_sets.mean_corruption_error(rows)}


def _probes(
    options: Options, model: DAT, cfg: PretrainedCfg, config: Config, spec: str, device: torch.device
) -> dict[str, Any]:
    """Accuracies on frozen features, in percent; empty on ranks other than 0."""
    source = options.train or config.data.train
    if source is None:
        raise ConfigError("--knn and --linear-probe need training images: give --train")
    if options.test_set == "imagenet-c":
        raise ConfigError("--knn and --linear-probe take one set of images, not imagenet-c's many")
    found: list[tuple[Tensor, Tensor]] = []
    for path, limit, title in (
        (source, options.train_limit, "features of the training set"),
        (spec, None, "features"),
    ):
        loader = inference.open_loader(config, cfg, path, inference.Views(), device=device)
        with closing(loader), autocast(device, options.precision):
            found.append(inference.features(model, cfg, loader, device=device, limit=limit, title=title))
    if inference.rank_and_world()[0]:
        return {}
    (train, train_labels), (test, labels) = ((x[y >= 0], y[y >= 0]) for x, y in found)
    out: dict[str, Any] = {"train": source, "train_images": len(train)}
    if options.knn is not None:
        votes = probe.knn(train, train_labels, test, classes=cfg.num_classes, k=options.knn)
        out |= {"knn_k": options.knn, "knn_top1": 100 * float((votes.argmax(1) == labels).float().mean())}
    if options.linear_probe:
        layer, decay = probe.linear_probe(train, train_labels, classes=cfg.num_classes)
        right = layer(test).argmax(1) == labels
        out |= {"linear_top1": 100 * float(right.float().mean()), "linear_decay": decay}
    return out
