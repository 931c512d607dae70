"""Evaluate one model over a data set: of a classifier accuracy, calibration, speed and what its frozen features are worth.

Runs in one process, or in a process group, where each rank takes its part of the images and rank 0 has the results. The
loop over the images is in ``inference``, the metrics in ``metrics``, ImageNet's other test sets in ``test_sets``; what is done with
a segmentation network is in ``segmentation``, with a detector in ``detection``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dattrain.config.schema import Config
from dattrain.errors import ConfigError
from dattrain.evaluation import detection, inference, metrics, probe, segmentation, test_sets
from dattrain.evaluation.options import DEFAULTS, Options, adjusted, autocast
from dattrain.models import flops
from dattrain.models.dat import DAT
from dattrain.models.dense.detector import Detector
from dattrain.models.dense.segmenter import Segmenter
from dattrain.pretrained import class_names
from dattrain.pretrained.pretrained_cfg import PretrainedCfg
from dattrain.pretrained.weights import config_of, load_model
from dattrain.runtime.environment import device_called
from dattrain.urls import mask


@dataclass(frozen=True)
class Evaluation:
    """What was found, on rank 0; on other ranks the metrics are left out.

    ``report`` holds plain values: the model (``parameters``, ``gflops``, ...), the data, and the metrics (``top1``, ``top5``
    in percent with ``top1_low`` and ``top1_high``, ``loss`` in nats, ``ece`` in percent, ``images_per_s``, ...; of a segmentation
    network ``miou``, ``macc``, ``aacc`` in percent, ``loss``, and ``per_class``; of a detector ``ap`` ... ``ar_large``, and ``per_class``). ``records`` is a row per image of a classifier (None
    for ImageNet-C, which is many sets); ``keys`` are the images' names where they were asked for.
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
    options: Options = DEFAULTS,
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
        path,
        ema=options.ema,
        device=device,
        img_size=options.img_size,
        bias_table=options.bias_table,
    )
    if isinstance(model, Segmenter):
        return Evaluation(segmentation.evaluate(path, model, cfg, options, device, on_open), cfg)
    if isinstance(model, Detector):
        return Evaluation(detection.evaluate(path, model, cfg, options, device, on_open), cfg)
    options.check_task("classification", path)
    if not cfg.num_classes:
        raise ConfigError(f"{path}: has no classification head to evaluate")
    cfg = replace(cfg, resize=options.resize or cfg.resize, crop_pct=options.crop_pct or cfg.crop_pct)
    config = adjusted(config_of(path) or Config(), options)
    spec = options.data or config.data.val
    if spec is None:
        raise ConfigError(f"{path} does not say which images to evaluate on (data.val): give --data")
    views = inference.Views(bool(options.flip), options.crops)
    report: dict[str, Any] = {
        "model": str(path),
        "task": "classification",
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
