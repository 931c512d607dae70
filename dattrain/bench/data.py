"""``dattrain bench data``: the input pipeline against torchvision's, timm's, webdataset's and DALI, on the same images.

Two tables. In the first, whole pipelines with worker processes take turns over the images; what counts is CPU seconds of
all processes per image, since wall time depends on how many cores happen to be free. In the second, one process
decodes, against nothing but decompressing the same files with libjpeg-turbo: the limit of any decoder that looks at
every pixel. Then a few training steps say what share of their time is spent waiting for data.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from pathlib import Path

from dattrain.bench.common import Measurement, Report, add_output_arguments, compare, emit
from dattrain.bench.data_images import prepare
from dattrain.bench.data_pipelines import BASELINE, LIMIT, OURS, Bench, wait_share

PIPELINES = "whole pipeline"
DECODING = "one process, decoding alone"
BAR_PIPELINE, BAR_DECODING = 2.2, 0.75


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subverb."""
    given = parser.add_mutually_exclusive_group()
    given.add_argument(
        "--images", type=Path, metavar="DIR", help="image folder to measure on, DIR/<class>/<image>"
    )
    given.add_argument("--shards", metavar="PATTERN", help="indexed tar shards to measure on")
    parser.add_argument(
        "--count",
        type=_count,
        default=2048,
        metavar="N",
        help="images per turn (default 2048); made if none are given",
    )
    parser.add_argument("--workers", type=_count, default=2, metavar="N", help="worker processes (default 2)")
    parser.add_argument("--batch", type=_count, default=64, metavar="N", help="micro-batch (default 64)")
    parser.add_argument(
        "--size", type=_count, default=224, metavar="PX", help="side of the output (default 224)"
    )
    parser.add_argument(
        "--model", default="dat_tiny", metavar="NAME", help="of the training step (default dat_tiny)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=6,
        metavar="N",
        help="training steps for the share of waiting; 0: none (default 6)",
    )
    parser.add_argument(
        "--device",
        default=None,
        metavar="NAME",
        help="of DALI and of the training step (default: cuda, else cpu)",
    )
    add_output_arguments(parser)
    parser.set_defaults(rounds=5)


def run(args: argparse.Namespace) -> int:
    """Run the bench; returns 0 whether or not the bars are met."""
    import torch

    torch.set_num_threads(1)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with tempfile.TemporaryDirectory(prefix="dattrain-bench-") as made:
        images = prepare(args, Path(made))
        bench = Bench(images, args.workers, args.batch, args.size, device)
        pipelines = compare(
            f"{PIPELINES}, {args.workers} workers",
            bench.pipelines(),
            baseline=BASELINE,
            rounds=args.rounds,
            warmup=1,
            min_seconds=0,
            items=bench.per_turn,
            cpu_clock=cpu_seconds,
            extra=bench.outputs,
        )
        decoders = compare(
            DECODING,
            bench.decoders(),
            baseline=LIMIT,
            rounds=args.rounds,
            warmup=1,
            min_seconds=0,
            items=bench.per_decoding,
            cpu_clock=cpu_seconds,
        )
        rows = [with_cpu_throughput(m) for m in [*pipelines, *decoders]]
        report = Report("Input pipeline", rows, item="image")
        report.notes += [images.describe(), *bars(rows)]
        if args.steps > 0:
            report.notes.append(wait_share(bench, args.model, args.steps))
        if device.type == "cpu":
            report.notes.append(
                "No GPU was used; DALI decoded on the CPU. Not measured: nvJPEG and the GPU's resize."
            )
        emit(report, args)
    return 0


def with_cpu_throughput(m: Measurement) -> Measurement:
    """With images per CPU second as a column."""
    from dataclasses import replace

    assert m.items is not None
    return replace(m, extra={"images per CPU second": m.items / m.cpu.median, **m.extra})


def bars(rows: list[Measurement]) -> list[str]:
    """What the two bars of issue B say of these measurements."""
    lines = []
    for case, bar, against in (
        (PIPELINES, BAR_PIPELINE, BASELINE),
        (DECODING, BAR_DECODING, LIMIT),
    ):
        row = next(m for m in rows if m.name == OURS and m.case.startswith(case))
        ratio = row.cpu_ratio
        lines.append(
            f"Per CPU second, {case}: {ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f}) times {against}; "
            f"the bar is {bar}: {'met' if ratio.median >= bar else 'NOT met'}."
        )
    return lines


def cpu_seconds() -> float:
    """Of this process and of its children that have ended, user and system."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
