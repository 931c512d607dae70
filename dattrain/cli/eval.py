"""``dattrain eval``: accuracy, calibration, speed and features of one model, or of several beside each other.

Runs in one process, or under torchrun and srun, where each rank takes its part of the images and rank 0 reports. The pass
over the data is in ``passes``, the figures and their tables in ``figures``, ImageNet's other test sets in ``testsets``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dattrain.errors import ConfigError
from dattrain.urls import mask

if TYPE_CHECKING:
    import torch

    from dattrain.config.schema import Config
    from dattrain.pretrained.weights import Card

TEST_SETS = ("imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-sketch", "imagenet-c", "real")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "model", metavar="RUN|CHECKPOINT|FILE", help="whose weights; of a run, its newest checkpoint"
    )
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="OTHER", help="more of the same, in one table"
    )
    parser.add_argument(
        "--data", metavar="PATH", help="shards or an image folder (default: the run's data.val)"
    )
    parser.add_argument(
        "--labels",
        choices=TEST_SETS,
        help="--data is one of ImageNet's other test sets, in the layout it comes in",
    )
    parser.add_argument(
        "--img-size", type=int, nargs="+", metavar="N", help="another size: N, or HEIGHT WIDTH"
    )
    parser.add_argument(
        "--bias-table",
        choices=("resize", "sample"),
        default="resize",
        help="at another size: resize tables bicubically (default), or sample the continuous ones as they are",
    )
    parser.add_argument("--resize", choices=("shorter", "squash"), help="(default: as the run evaluates)")
    parser.add_argument(
        "--crop-pct", type=float, metavar="P", help="crop's share of the resized side (default: the run's)"
    )
    parser.add_argument("--flip", action="store_true", help="average with the mirror image")
    parser.add_argument("--crops", type=int, choices=(1, 5), default=1, help="average over five crops")
    parser.add_argument(
        "--csv", type=Path, metavar="DIR", help="tables per class and image, confusion, calibration; pictures"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures, for programs")
    parser.add_argument(
        "--knn",
        type=int,
        nargs="?",
        const=20,
        metavar="K",
        help="accuracy of K nearest neighbours (20) on frozen features",
    )
    parser.add_argument(
        "--linear-probe", action="store_true", help="accuracy of a linear classifier on frozen features"
    )
    parser.add_argument(
        "--train", metavar="PATH", help="images for --knn and --linear-probe (default: the run's data.train)"
    )
    parser.add_argument("--train-limit", type=int, metavar="N", help="use the first N of them per rank")
    parser.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, help="averaged weights (default: where there are any)"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="autocast (default: fp32)"
    )
    parser.add_argument(
        "--batch", type=int, metavar="N", help="images at a time (default: the run's eval.batch)"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="decoding processes (default: the run's data.workers)"
    )
    parser.add_argument(
        "--on-bad",
        choices=("error", "skip"),
        help="an image that cannot be read ends it, or is left out and counted (default: the run's data.on_bad)",
    )
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="where shards at s3://, https://, ... are kept (default: the run's)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")


def run(args: argparse.Namespace) -> int:
    """Evaluate each model in turn; rank 0 prints, and writes what was asked for."""
    import torch

    from dattrain.evaluation import summary
    from dattrain.runtime.environment import leave, pick_device, process_group, raise_open_files, resolve

    if args.batch is not None and args.batch < 1:
        raise ConfigError(f"--batch {args.batch} must be at least 1")
    if args.crop_pct is not None and not 0 < args.crop_pct <= 1:
        raise ConfigError(f"--crop-pct {args.crop_pct} must be above 0 and at most 1")
    if args.knn is not None and args.knn < 1:
        raise ConfigError(f"--knn {args.knn} must be at least 1")
    if args.labels and not args.data:
        raise ConfigError(f"--labels {args.labels} needs --data, the folder of that set")
    raise_open_files()
    env = resolve(os.environ)
    device = torch.device(args.device) if args.device else pick_device(env)
    with process_group(env, device) if env.world > 1 else nullcontext():
        reports = [_one(args, path, device, env.rank == 0) for path in [args.model, *args.compare]]
    if env.rank == 0 and len(reports) > 1:
        print("\n" + summary.comparison(reports))
    if env.rank == 0 and args.json:
        plain = [{k: v for k, v in report.items() if k != "records"} for report in reports]
        whole = plain[0] if len(plain) == 1 else {"models": plain}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(summary.finite(whole), indent=2) + "\n", encoding="utf-8")
    if env.world > 1:
        leave(0)
    return 0


def _one(args: argparse.Namespace, path: str, device: torch.device, speaks: bool) -> dict[str, Any]:
    """Everything asked for of one model; on rank 0 the report (``records`` with it), elsewhere nothing."""
    from dattrain.cli.viz import image_size
    from dattrain.evaluation import inference, summary, test_sets
    from dattrain.models import flops
    from dattrain.pretrained import class_names
    from dattrain.pretrained.weights import config_of, load_model

    model, card = load_model(
        path, ema=args.ema, device=device, img_size=image_size(args.img_size), bias_table=args.bias_table
    )
    if not card.num_classes:
        raise ConfigError(f"{path}: has no classification head to evaluate")
    card = replace(card, resize=args.resize or card.resize, crop_pct=args.crop_pct or card.crop_pct)
    config = adjusted(config_of(path), args)
    spec = args.data or config.data.val
    if spec is None:
        raise ConfigError(f"{path} does not say which images to evaluate on (data.val): give --data")
    views = inference.Views(args.flip, args.crops)
    report: dict[str, Any] = {
        "model": path,
        "name": card.name,
        "source": card.source,
        "img_size": list(card.img_size),
        "classes": card.num_classes,
        "parameters": flops.parameters(model),
        "gflops": flops.flops(model, card.img_size, card.in_chans) / 1e9,
        "data": mask(spec),
        "views": (2 if args.flip else 1) * args.crops,
        "device": str(device),
        "precision": args.precision,
    }
    if speaks:
        print(summary.headline(report))
    results = []
    parts = test_sets.parts(args.labels, spec, card)
    for part in parts:
        loader = inference.open_loader(config, card, part.path, views, device=device)
        try:
            with _autocast(device, args.precision):
                results.append(
                    inference.classify(
                        model,
                        card,
                        loader,
                        device=device,
                        views=views,
                        among=part.among,
                        keep_keys=bool(args.csv) or args.labels == "real",
                        title=part.name,
                    )
                )
        finally:
            loader.close()
    if args.knn is not None or args.linear_probe:
        probes = _probes(args, model, card, config, spec, device)
    else:
        probes = {}
    if not speaks:
        return {}
    if args.labels == "imagenet-c":
        _corruptions(report, parts, results)
        return report
    (result,) = results
    assert result.records is not None
    accepted = test_sets.real_answers(result.keys, card) if args.labels == "real" else None
    report |= summary.of(result.records, accepted)
    report |= {
        "records": result.records,
        "bad": result.bad,
        "images_per_s": result.images / result.seconds,
        "network_images_per_s": result.images / result.forward_seconds,
        **probes,
    }
    print(summary.summary(report))
    if args.csv:
        from dattrain.evaluation import charts

        names = class_names.names(card.num_classes, card.labels, card.classes)
        folder = args.csv if not args.compare else args.csv / _slug(path)
        for file in charts.write_all(folder, result.records, names, result.keys, card.source or card.name):
            print(file)
    return report


def adjusted(config: Config | None, args: argparse.Namespace) -> Config:
    """The run's settings, with what the command line says of them; the defaults where there is no run."""
    from dattrain.config.schema import Config as Schema

    config = config or Schema()
    batch = args.batch or config.eval.batch
    workers = config.data.workers if args.workers is None else args.workers
    on_bad = args.on_bad or config.data.on_bad
    cache_dir = args.cache_dir or config.data.cache_dir
    return config.model_copy(
        update={
            "eval": config.eval.model_copy(update={"batch": batch}),
            "data": config.data.model_copy(
                update={"workers": workers, "on_bad": on_bad, "cache_dir": cache_dir}
            ),
        }
    )


def _corruptions(report: dict[str, Any], parts: Sequence[Any], results: Sequence[Any]) -> None:
    from dattrain.evaluation import metrics, test_sets

    top1 = {part.name: metrics.top1_top5(result.records)[0] for part, result in zip(parts, results)}
    rows = test_sets.corruption_table(top1)
    mce = test_sets.mean_corruption_error(rows)
    report |= {"top1": sum(float(row["top1"]) for row in rows) / len(rows), "corruptions": rows, "mce": mce}
    for row in rows:
        print(
            f"  {row['corruption']:20} top-1 {row['top1']:6.2f} %   error relative to AlexNet {row['ce']:6.1f} %"
        )
    missing = "" if not math.isnan(mce) else " (needs all 15 corruptions)"
    print(f"  mean top-1 {report['top1']:.2f} %   mCE {mce:.1f} %{missing}")


def _probes(
    args: argparse.Namespace, model: Any, card: Card, config: Config, spec: str, device: torch.device
) -> dict[str, Any]:
    from dattrain.evaluation import inference, probe

    source = args.train or config.data.train
    if source is None:
        raise ConfigError("--knn and --linear-probe need training images: give --train")
    if args.labels == "imagenet-c":
        raise ConfigError("--knn and --linear-probe take one set of images, not imagenet-c's many")
    found = []
    for path, limit, title in (
        (source, args.train_limit, "features of the training set"),
        (spec, None, "features"),
    ):
        loader = inference.open_loader(config, card, path, inference.Views(), device=device)
        try:
            with _autocast(device, args.precision):
                found.append(inference.features(model, card, loader, device=device, limit=limit, title=title))
        finally:
            loader.close()
    if inference.place()[0]:
        return {}
    (train, train_labels), (test, labels) = ((x[y >= 0], y[y >= 0]) for x, y in found)
    out: dict[str, Any] = {"train": source, "train_images": len(train)}
    if args.knn is not None:
        votes = probe.knn(train, train_labels, test, classes=card.num_classes, k=args.knn)
        out |= {"knn_k": args.knn, "knn_top1": 100 * float((votes.argmax(1) == labels).float().mean())}
    if args.linear_probe:
        layer, decay = probe.linear_probe(train, train_labels, classes=card.num_classes)
        right = layer(test).argmax(1) == labels
        out |= {"linear_top1": 100 * float(right.float().mean()), "linear_decay": decay}
    return out


def _autocast(device: torch.device, precision: str) -> Any:
    import torch

    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def _slug(path: str) -> str:
    return path.strip("/").replace("/", "_") or "model"
