"""Stages ``model``, ``table``, ``large`` and ``cpu``: whole models by ``dattrain bench model``, images/s and peak memory."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from benchmarks.gpu.job import Job
from dattrain.bench.common import describe_machine
from dattrain.bench.model import COMPILED, COMPILED_PEAK

DRY = ("--vs", "test_resnet", "--img-size", "32", "--batch", "2", "--dtypes", "fp32", "--rounds", "1")
TABLE = (
    "swin_tiny_patch4_window7_224",
    "swin_small_patch4_window7_224",
    "swin_base_patch4_window7_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "dat_tiny",
    "dat_small",
    "dat_base",
    "dat_pp_tiny",
    "dat_pp_small",
    "dat_pp_base",
)


def tiny(job: Job) -> None:
    """DAT-T and Swin-T, training then inference, compiled: the bar, then the rest."""
    words = ["dat_tiny", "--compile", "--channels-last", "--dtypes", "bf16", "--rounds", "5"]
    if job.dry:
        words = ["dat_atto", *DRY]
    for direction in ("training", "inference"):
        if direction == "inference" and not job.dry and job.left() < 60:
            print("no time for inference", flush=True)
            break
        rows = bench(job, "model", [*words, "--train" if direction == "training" else "--infer"], direction)
        report(job, rows)
        theirs, ours = rows
        job.figure(
            f"dat_tiny 224 px {direction}: speed, swin_tiny = 1, both compiled",
            speed(ours) / speed(theirs),
            "times",
        )


def table(job: Job) -> None:
    """All models at 224 and 384, not compiled, training and inference; half the batch where the largest do not fit."""
    import torch

    for size, batch in ((32, 2),) if job.dry else ((224, 128), (384, 32)):
        for direction in ("--train", "--infer"):
            while True:
                if not job.dry and job.left() < 60:
                    print(f"no time for {size} px {direction}", flush=True)
                    return
                words = [*TABLE[1:], "--vs", TABLE[0], "--img-size", str(size), "--batch", str(batch)]
                words += ["--dtypes", "bf16", "--channels-last", "--rounds", "3"]
                try:
                    rows = bench(
                        job,
                        "model",
                        [*(["dat_atto", *DRY] if job.dry else words), direction],
                        f"{direction}-{size}",
                    )
                    break
                except torch.OutOfMemoryError as error:
                    print(f"{size} px, {batch} images: {error}", flush=True)
                torch.cuda.empty_cache()
                batch //= 2
            report(job, rows)


def large(job: Job) -> None:
    """DAT-B at 384 pixels with the package's core and with the straightforward one, both compiled."""
    words = [
        "dat_base",
        "--vs",
        "dat_base",
        "--straightforward",
        "--compile",
        "--img-size",
        "384",
        "--batch",
        "32",
    ]
    words += ["--dtypes", "bf16", "--train", "--rounds", "5"]
    if job.dry:
        words = ["dat_atto", *DRY, "--vs", "dat_atto", "--straightforward", "--train"]
    rows = bench(job, "model", words, "large")
    report(job, rows)
    (ours,) = (row for row in rows if not row["name"].endswith("+straightforward"))
    (plain,) = (row for row in rows if row["name"].endswith("+straightforward"))
    figure = "dat_base 384 px training: speed, straightforward = 1, both compiled"
    job.figure(figure, speed(ours) / speed(plain), "times")


def cpu(job: Job) -> None:
    """DAT-T beside Swin-T on two threads of the host, which may be another processor than others were measured on."""
    from dattrain.ops.cpp import build

    job.figure("processor", describe_machine()["device"])
    job.figure("native backend", build.status()[1])
    words = ["dat_tiny", "--img-size", "224", "384", "--batch", "8", "--threads", "2", "--rounds", "3"]
    rows = bench(job, "model", [*(["dat_atto", *DRY] if job.dry else words), "--device", "cpu"], "cpu")
    report(job, rows)
    for row in rows:
        if row["name"] != row["baseline"]:
            job.figure(f"{row['case']}: speed, {row['baseline']} = 1", row["ratio"][0], "times")


def bench(job: Job, verb: str, words: list[str], name: str) -> list[dict[str, Any]]:
    """The measurements of ``dattrain bench verb words``, which is printed first.

    Raises:
        RuntimeError: it failed, or measured something that could not be compiled without that.
    """
    from dattrain.cli.main import main

    file = job.folder / f"{name.strip('-')}.json"
    # ``bench checkpoint`` starts ranks, which take the devices that they see.
    where = [] if verb == "checkpoint" or "--device" in words else ["--device", job.device]
    command = ["bench", verb, *words, *where, "--json", str(file)]
    print("$ dattrain", *command, flush=True)
    # DeepSpeed keeps groups of the first process group of a process, and the second ``bench step`` in it would meet them.
    own = [sys.executable, "-m", "dattrain", *command]
    if code := subprocess.run(own).returncode if verb == "step" else main(command):
        raise RuntimeError(f"dattrain bench {verb} ended with exit code {code}")
    found = json.loads(file.read_text(encoding="utf-8"))
    failed = [note for note in found["notes"] if "torch.compile failed" in note]
    if failed:
        raise RuntimeError(failed[0])
    measurements: list[dict[str, Any]] = found["measurements"]
    return measurements


def speed(row: dict[str, Any]) -> float:
    """Images/s: compiled, where the row has that."""
    return float(row["extra"].get(COMPILED) or row["items"] / row["wall"][0])


def report(job: Job, rows: list[dict[str, Any]]) -> None:
    """Images/s and peak memory of every row, and both compiled, where it has that."""
    for row in rows:
        where = f"{row['case']}: {row['name']}"
        job.figure(where, row["items"] / row["wall"][0], "images/s")
        extra = row["extra"]
        if "GB peak" in extra:
            job.figure(f"{where}, peak over the weights", extra["GB peak"], "GB")
        if COMPILED in extra:
            job.figure(f"{where}, compiled", extra[COMPILED], "images/s")
        if COMPILED_PEAK in extra:
            job.figure(f"{where}, compiled, peak over the weights", extra[COMPILED_PEAK], "GB")
