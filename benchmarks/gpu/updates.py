"""Stages ``step``, ``memory``, ``largest`` and ``checkpoint``: whole updates by ``dattrain bench step``, and saves."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.job import Job
from benchmarks.gpu.models import bench
from dattrain.bench import step
from dattrain.bench.attention import pick_device
from dattrain.bench.contender import open_contender
from dattrain.config.schema import Config
from dattrain.runtime import environment

IMAGENET = 1_281_167
TINY = (
    "model.name=dat_atto",
    "model.img_size=64",
    "model.num_classes=10",
    "train.micro_batch=2",
    "train.precision=fp32",
)


def parts(job: Job) -> None:
    """DAT-T at micro-batch 128: eager, compiled per block, and with CUDA graphs; at 16 too, where launches weigh most."""
    for micro_batch in (2,) if job.dry else (128, 16):
        if not job.dry and job.left() < 50:
            print(f"no time for micro-batch {micro_batch}", flush=True)
            break
        words = [*(TINY if job.dry else (f"train.micro_batch={micro_batch}",))]
        # Without a GPU nothing is compiled: that takes longer than everything else.
        vary = [] if job.dry else ["--vary", "train.compile=block"]
        rows = bench(
            job,
            "step",
            [
                *words,
                *(vary or ["--vary", "train.activation_checkpointing=block"]),
                "--rounds",
                "1" if job.dry else "5",
            ],
            f"step-{micro_batch}",
        )
        report(job, rows)
        if not job.dry:
            graphs = [*words, "train.compile=block", "--vary", "train.cuda_graphs=true", "--rounds", "5"]
            rows = bench(job, "step", graphs, f"graphs-{micro_batch}")
            report(job, rows)
            ratio = rows[0]["wall"][0] / rows[1]["wall"][0]
            job.figure(
                f"micro-batch {micro_batch}: speed with CUDA graphs, compiled without = 1", ratio, "times"
            )


def memory(job: Job) -> None:
    """DAT-T and DAT-B at micro-batch 128 with every kind of activation checkpointing."""
    for model in ("dat_atto",) if job.dry else ("dat_tiny", "dat_base"):
        words = [*(TINY if job.dry else (f"model.name={model}", "train.micro_batch=128"))]
        kinds = "stage" if job.dry else "none,selective,block,stage"
        words += ["--vary", f"train.activation_checkpointing={kinds}", "--rounds", "1" if job.dry else "3"]
        report(job, bench(job, "step", words, f"memory-{model}"))


def report(job: Job, rows: list[Any]) -> None:
    """Images/s, seconds of an ImageNet epoch on this device, memory."""
    for row in rows:
        where = f"{row['case']}, {row['name']}"
        rate = row["items"] / row["wall"][0]
        job.figure(where, rate, "images/s")
        job.figure(f"{where}: an ImageNet-1K epoch", IMAGENET / rate, "s")
        for name, unit in (("GB peak", "GB"), ("MB kept/image", "MB")):
            if name in row["extra"]:
                job.figure(f"{where}: {name}", row["extra"][name], unit)


def largest(job: Job) -> None:
    """The largest micro-batch that an update fits with, by doubling and halving."""
    device = pick_device(job.device)
    asked = [
        (f"model.name={m}", f"model.img_size={s}")
        for m, s in (("dat_tiny", 224), ("dat_base", 224), ("dat_base", 384))
    ]
    with environment.process_group(environment.resolve({}), device):
        for words in [TINY[:3]] if job.dry else asked:
            for mode in ("block",) if job.dry else ("none", "block"):
                config = step.read(
                    [*words, f"train.activation_checkpointing={mode}", "train.micro_batch=2"], 1
                )
                found = search(
                    partial(fits, config, device=device),
                    first=2 if job.dry else 64,
                    grain=1 if job.dry else 16,
                    most=4 if job.dry else 4096,
                    going=lambda: job.dry or job.left() > 10,
                )
                job.figure(f"{' '.join(words[:2])} {mode}", found, "images")
                if not job.dry and job.left() < 20:
                    return


def search(
    fits: Callable[[int], bool],
    *,
    first: int,
    grain: int,
    most: int,
    going: Callable[[], bool] = lambda: True,
) -> int:
    """The largest multiple of ``2 * grain`` up to ``most`` that fits, as far as ``going`` lets it be sought; 0 for none."""
    good, bad, count = 0, most + 1, first
    while good < count <= most and going():
        if fits(count):
            good, count = count, count * 2
        else:
            bad = count
            break
    unit = 2 * grain  # mixing takes neighbours in pairs
    while (middle := (good + bad) // 2 // unit * unit) > good and going():
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def fits(config: Config, count: int, device: torch.device) -> bool:
    """Whether an update with a micro-batch of ``count`` fits."""
    train = config.train.model_copy(update={"micro_batch": count, "global_batch": count})
    contender = None
    try:
        # Not as the baseline, for which running out of memory is an error.
        contender = open_contender("tried", config.model_copy(update={"train": train}), device, [])
        return contender is not None
    finally:
        if contender is not None:
            contender.close()
        del contender
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def checkpoint(job: Job) -> None:
    """``dattrain bench checkpoint`` with one rank: what the step loop waits for a save in background, and in foreground."""
    parameters, rounds = ("1e5", "1") if job.dry else ("9e7", "5")
    words = [
        "--parameters",
        parameters,
        "--ranks",
        "1",
        "--load-ranks",
        "1",
        "--rounds",
        rounds,
        "--dir",
        str(job.folder),
    ]
    rows = {
        (row["case"].split(" (")[0], row["name"]): row
        for row in bench(job, "checkpoint", words, "checkpoint")
    }
    blocking = rows["step loop waits", "blocking save"]["wall"][0]
    background = rows["step loop waits", "background save"]["wall"][0]
    job.figure("blocking save", blocking, "s")
    job.figure("wait for a background save, blocking save = 1", background / blocking)
    alone, beside = (rows["update beside it", name]["wall"][0] for name in ("no save", "background save"))
    job.figure("update beside a background save, alone = 1", beside / alone, "times")
    disk = rows["state to disk", "disk alone (best of these)"]["wall"][0]
    job.figure(
        "disk alone, share of the save's time", disk / rows["state to disk", "background save"]["wall"][0]
    )
