"""Stages ``dense`` and ``detect``: real trainings on the device, on scenes of the demo's pictures, and the speed of the recipes' sizes.

In deterministic mode (UperNet with SyncBatchNorm, and RetinaNet): one training that is never disturbed and one that is killed with SIGKILL
and started again must end with the same bits. Then short ones: compiled, and with DALI where it is installed; Mask R-CNN and its cascade. Then
``benchmarks.dense_speed`` in bf16.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.job import Job
from benchmarks.gpu.train import ROOT, differing, kill, pack, resumed, rows, train
from dattrain.bench.attention import pick_device
from dattrain.runtime import environment

DEMO = ROOT / "configs" / "demo"


def segmentation(job: Job) -> None:
    """UperNet; at 512 x 512 beside Swin-T."""
    settings = ["task.head=upernet", "geometry.distortion=true"]
    settings += ["task.channels=16"] if job.dry else ["task.norm=sync"]
    trainings(job, DEMO / "segment.yaml", settings, compiled_and_dali(job.dry))
    speed(job, ["--norm", "sync", "--batch", "4"], ["--classes", "5"])


def detection(job: Job) -> None:
    """RetinaNet, Mask R-CNN and its cascade; Mask R-CNN at 800 x 1280 beside Swin-T."""
    settings = ["task.channels=16"] if job.dry else []
    # RoIAlign has no deterministic backward pass on CUDA: the R-CNNs are trained without.
    others = {
        "mask_rcnn": ["task.head=mask_rcnn"],
        "cascade_mask_rcnn": ["task.head=cascade_mask_rcnn", f"task.norm={'group' if job.dry else 'sync'}"],
    }
    if not job.dry:
        others["mask_rcnn fp16"] = ["task.head=mask_rcnn", "train.precision=fp16"]
    trainings(job, DEMO / "detect.yaml", settings, others)
    words = ["--head", "mask_rcnn", "--classes", "80", "--size", "800", "1280", "--batch", "2"]
    speed(job, words, ["--head", "mask_rcnn", "--classes", "5"])


def trainings(job: Job, recipe: Path, settings: Sequence[str], others: Mapping[str, Sequence[str]]) -> None:
    """Train, kill, resume, compare; then short ones with ``others`` changed, by their name."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    steps, every = (4, 1) if job.dry else (40, 10)
    common = [*scenes(job.folder, 24 if job.dry else 512), "schedule.warmup_updates=2"]
    common += [f"checkpoint.every_steps={every}", "eval.every_steps=1000"]
    if job.dry:
        common += ["train.global_batch=4", "train.micro_batch=2", "data.workers=0"]
    else:
        common += ["train.precision=bf16"]
    exact = [*common, *settings, "train.deterministic=true", f"schedule.updates={steps}"]
    killed, whole = job.folder / "killed", job.folder / "whole"
    job.figure("killed behind the save of step", kill(killed, exact, recipe))
    losses = []
    with environment.process_group(environment.resolve({}), pick_device(job.device)):
        train(killed, exact, recipe)
        job.figure("resumed", resumed(killed), "times")
        train(whole, exact, recipe)
        job.figure("tensors that differ after SIGKILL and resume", differing(whole, killed, steps))
        losses += rows(whole)
        for name, changed in others.items():
            folder = job.folder / name.replace(" ", "-")
            train(folder, [*common, *settings, *changed, f"schedule.updates={3 if job.dry else 20}"], recipe)
            losses += rows(folder)
            job.figure(f"{name}: dat_atto", rows(folder)[-1]["images_per_s"], "images/s")
    job.figure("losses not finite", sum(not math.isfinite(row["loss"]) for row in losses))


def compiled_and_dali(dry: bool) -> dict[str, list[str]]:
    """Settings of the short trainings of segmentation by their name."""
    # Without a GPU compilation takes longer than everything else.
    found = {} if dry else {"compiled": ["train.compile=block"]}
    if find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None:
        found["dali"] = ["data.decoder=dali"]
    else:
        print("DALI is not installed here", flush=True)
    return found


def scenes(folder: Path, count: int) -> list[str]:
    """So many scenes as shards in ``folder``; the override that names them."""
    from dattrain.cli.main import main
    from dattrain.demo import scenes
    from dattrain.demo.results import CLASSES, read

    pack(folder, 2 * count)
    images, labels = read(f"{folder}/train")
    file = scenes.write(folder / "scenes", images, labels, CLASSES, seed=0, count=count)
    words = ["data", "pack", "--coco", str(file), f"{folder}/scene-shards", "--split", "train", "--jobs", "1"]
    if code := main(words):
        raise RuntimeError(f"dattrain {' '.join(words)} ended with exit code {code}")
    return [f"data.train={folder}/scene-shards/train-*.tar", "data.lanes=4"]


def speed(job: Job, words: Sequence[str], dry: Sequence[str]) -> None:
    """DAT-T beside Swin-T: images/s and peak memory, where there is time left; ``dry`` are the words of a dry run."""
    if not job.dry and job.left() < 80:
        return
    file = job.folder / "speed.json"
    if job.dry:
        small = [
            "dat_atto",
            "--vs",
            "pvt_v2_b0",
            "--size",
            "64",
            "--batch",
            "2",
            "--channels",
            "16",
            "--rounds",
            "1",
        ]
        words = [*small, *dry]
    else:
        words = ["dat_tiny", "--dtypes", "bf16", "--rounds", "5", *words]
    command = [sys.executable, "-m", "benchmarks.dense_speed", *words]
    command += ["--device", job.device, "--json", str(file)]
    print("$", *command, flush=True)
    if code := subprocess.run(command).returncode:
        raise RuntimeError(f"benchmarks.dense_speed ended with exit code {code}")
    for row in json.loads(file.read_text(encoding="utf-8"))["measurements"]:
        where = f"{row['case']}: {row['name']}"
        job.figure(where, row["items"] / row["wall"][0], "images/s")
        job.figure(f"{where}, peak", row["extra"]["MB peak"], "MB")
