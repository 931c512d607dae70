"""``dattrain eval``: accuracy, calibration, speed and features of one classifier, mIoU of a segmentation network, AP of a detector, or of several beside each other.

Runs in one process, or under torchrun and srun, where rank 0 prints.
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dattrain.cli import outputs
from dattrain.cli.loading import loading
from dattrain.data.labels import TEST_SETS
from dattrain.errors import ConfigError
from dattrain.text import one_line

if TYPE_CHECKING:
    from dattrain.evaluation.evaluate import Evaluation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "model",
        metavar="RUN|CHECKPOINT|FILE",
        help="whose weights; of a run its last checkpoint, RUN@best its best, RUN@STEP that of a step",
    )
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="OTHER", help="more of the same, in one table"
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="shards, a folder of images, or a set with maps or objects (COCO's JSON, ...) (default: the run's data.val)",
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
        help="at another size: resize tables bicubically (default), or sample the continuous ones as they are",
    )
    parser.add_argument("--resize", choices=("shorter", "squash"), help="(default: as the run evaluates)")
    parser.add_argument(
        "--crop-pct", type=float, metavar="P", help="crop's share of the resized side (default: the run's)"
    )
    parser.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="average with the mirror image (default: no; segmentation: as the run evaluates)",
    )
    parser.add_argument("--crops", type=int, choices=(1, 5), default=1, help="average over five crops")
    parser.add_argument(
        "--scales",
        metavar="S,S,...",
        help="segmentation: average over the image resized by these factors, as 0.5,0.75,1,1.25,1.5,1.75 (default: the run's)",
    )
    parser.add_argument(
        "--mode",
        choices=("whole", "slide"),
        help="segmentation: the whole image at once, or windows of geometry.crop (default: the run's)",
    )
    parser.add_argument(
        "--csv",
        type=Path,
        metavar="DIR",
        help="tables per class and image, confusion, calibration; pictures (segmentation, detection: the table of classes)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the metrics, for programs")
    parser.add_argument(
        "--predictions",
        type=Path,
        metavar="FILE",
        help="detection: write the results as COCO's JSON, in the category ids of the set's own file",
    )
    parser.add_argument(
        "--boundary", action="store_true", help="detection: the numbers of masks by Boundary IoU too"
    )
    parser.add_argument(
        "--max-detections",
        type=int,
        metavar="N",
        help="detection: objects of an image at most (default: the run's)",
    )
    parser.add_argument(
        "--score-threshold",
        type=float,
        metavar="S",
        help="detection: least score of an object (default: the run's)",
    )
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
    with loading("torch"):
        from dattrain.evaluation import summary
        from dattrain.evaluation.evaluate import evaluate
        from dattrain.evaluation.options import Options
        from dattrain.pretrained.preprocess import image_size
        from dattrain.runtime.environment import (
            device_called,
            hard_exit,
            pick_device,
            process_group,
            raise_open_files,
            resolve,
        )

    options = Options(
        data=args.data,
        test_set=args.labels,
        img_size=image_size(args.img_size),
        bias_table=args.bias_table,
        resize=args.resize,
        crop_pct=args.crop_pct,
        flip=args.flip,
        crops=args.crops,
        scales=None if args.scales is None else scales(args.scales),
        mode=args.mode,
        max_detections=args.max_detections,
        score_threshold=args.score_threshold,
        boundary=args.boundary,
        predictions=None if args.predictions is None else str(args.predictions),
        knn=args.knn,
        linear_probe=args.linear_probe,
        train=args.train,
        train_limit=args.train_limit,
        ema=args.ema,
        precision=args.precision,
        batch=args.batch,
        workers=args.workers,
        on_bad=args.on_bad,
        cache_dir=args.cache_dir,
        keep_keys=bool(args.csv),
    )
    outputs.check_folder("--csv", args.csv)
    outputs.check_file("--json", args.json)
    outputs.check_file("--predictions", args.predictions)
    if args.predictions is not None and args.compare:
        raise ConfigError("--predictions is one file: evaluate one model at a time, without --compare")
    raise_open_files()
    env = resolve(os.environ)
    device = device_called(args.device) if args.device else pick_device(env)
    found: list[Evaluation] = []
    tasks: list[str] = []

    def opened(report: dict[str, Any]) -> None:
        tasks.append(report["task"])
        if tasks[0] != tasks[-1]:
            raise ConfigError(
                f"{report['model']}: is of {tasks[-1]}, and {args.model} of {tasks[0]}: they have no metric in common to compare"
            )
        if not env.rank:
            print(summary.headline(report))

    with process_group(env, device) if env.world > 1 else nullcontext():
        for path in [args.model, *args.compare]:
            one = evaluate(path, options, device=device, on_open=opened)
            if env.rank:
                continue
            print(summary.results(one.report))
            if args.predictions is not None:
                print(f"  {args.predictions}: the results, in COCO's format")
            if args.csv:
                _write_tables(args.csv / _slug(path) if args.compare else args.csv, one)
            found.append(one)
    if len(found) > 1:
        print("\n" + summary.comparison([one.report for one in found], [one.records for one in found]))
    if found and args.json:
        content = found[0].report if len(found) == 1 else {"models": [one.report for one in found]}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(summary.finite(content), indent=2) + "\n", encoding="utf-8")
    if env.world > 1:
        hard_exit(0)
    return 0


def _write_tables(folder: Path, evaluation: Evaluation) -> None:
    from dattrain.evaluation import charts

    cfg, records = evaluation.cfg, evaluation.records
    if cfg.task != "classification":
        print(charts.write_classes(folder, evaluation.report["per_class"]))
    if records is None:
        return
    title = one_line(cfg.source or cfg.name)
    for file in charts.write_all(folder, records, evaluation.class_names(), evaluation.keys, title):
        print(file)


def scales(text: str) -> tuple[float, ...]:
    """Numbers with commas between. Raises ConfigError."""
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise ConfigError(f"--scales {text}: numbers with commas between, as 0.5,1,1.5") from None


def _slug(path: str) -> str:
    return path.strip("/").replace("/", "_") or "model"
