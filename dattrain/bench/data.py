"""The input pipeline against torchvision's, timm's, webdataset's and DALI, on the same images.

Two tables. In the first, whole pipelines with worker processes take turns over the images; what counts is CPU seconds of
all processes per image, since wall time depends on how many cores happen to be free. In the second, one process
decodes, against nothing but decompressing the same files with libjpeg-turbo: the limit of any decoder that looks at
every pixel. Then a few training steps say what share of their time is spent waiting for data.
"""

from __future__ import annotations

import resource
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from dattrain.bench.common import BenchReport, Measurement, compare
from dattrain.bench.data_images import prepare
from dattrain.bench.data_pipelines import BASELINE, LIMIT, OURS, Pipelines, wait_share

PIPELINES = "whole pipeline"
DECODING = "one process, decoding alone"
BAR_PIPELINE, BAR_DECODING = 2.2, 0.75


def bench(
    *,
    folder: Path | None,
    shards: str | None,
    count: int,
    workers: int,
    batch: int,
    size: int,
    model: str,
    steps: int,
    device: torch.device,
    rounds: int,
) -> BenchReport:
    """Time whole pipelines, decoders alone, and the share of training steps that waits for data.

    Args:
        folder: image folder to measure on, or
        shards: pattern of indexed tar shards; images are made where there is neither.
        count: images per turn.
        workers: worker processes.
        batch: micro-batch.
        size: side of the output, in pixels.
        model: of the training steps.
        steps: how many; 0 for none.
        device: of DALI and of the training steps.
        rounds: turns of each contender.

    Raises:
        UserError: fewer images than asked for.
    """
    with tempfile.TemporaryDirectory(prefix="dattrain-bench-") as made:
        images = prepare(Path(made), folder=folder, shards=shards, count=count, batch=batch)
        contenders = Pipelines(images, workers, batch, size, device)
        timed = partial(compare, rounds=rounds, warmup=1, min_seconds=0, cpu_clock=cpu_seconds)
        pipelines = timed(
            f"{PIPELINES}, {workers} workers",
            contenders.pipelines(),
            baseline=BASELINE,
            items=contenders.per_turn,
            extra=contenders.outputs,
        )
        decoders = timed(DECODING, contenders.decoders(), baseline=LIMIT, items=contenders.per_turn)
        rows = [with_cpu_throughput(m) for m in [*pipelines, *decoders]]
        report = BenchReport("Input pipeline", rows, item="image")
        report.notes += [images.describe(), *bars(rows)]
        if steps > 0:
            report.notes.append(wait_share(contenders, model, steps))
        if device.type == "cpu":
            report.notes.append(
                "No GPU was used; DALI decoded on the CPU. Not measured: nvJPEG and the GPU's resize."
            )
        return report


def with_cpu_throughput(m: Measurement) -> Measurement:
    """With images per CPU second as a column."""
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
    """CPU seconds, user and system, of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)
