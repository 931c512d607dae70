"""Stage ``dense``: real trainings of UperNet on the device, on scenes of the demo's pictures, and the speed of its recipe's size.

In deterministic mode, with SyncBatchNorm: one training that is never disturbed and one that is killed with SIGKILL and started again must
end with the same bits. Then short ones, compiled, and with DALI where it is installed. Then ``benchmarks.dense_speed`` in bf16.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.job import Job
from benchmarks.gpu.train import ROOT, differing, kill, pack, resumed, rows, train
from dattrain.bench.attention import pick_device
from dattrain.runtime import environment

RECIPE = ROOT / "configs" / "demo" / "segment.yaml"


def run(job: Job) -> None:
    """Train, kill, resume, compare; then the speed."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    steps, every = (4, 1) if job.dry else (40, 10)
    settings = [*scenes(job.folder, 24 if job.dry else 512), "task.head=upernet", "geometry.distortion=true"]
    settings += ["schedule.warmup_updates=2", f"checkpoint.every_steps={every}", "eval.every_steps=1000"]
    if job.dry:
        settings += ["train.global_batch=4", "train.micro_batch=2", "data.workers=0", "task.channels=16"]
    else:
        settings += ["task.norm=sync", "train.precision=bf16"]
    exact = [*settings, "train.deterministic=true", f"schedule.updates={steps}"]
    killed, whole = job.folder / "killed", job.folder / "whole"
    job.figure("killed behind the save of step", kill(killed, exact, RECIPE))
    losses = []
    with environment.process_group(environment.resolve({}), pick_device(job.device)):
        train(killed, exact, RECIPE)
        job.figure("resumed", resumed(killed), "times")
        train(whole, exact, RECIPE)
        job.figure("tensors that differ after SIGKILL and resume", differing(whole, killed, steps))
        losses += rows(whole)
        for name, setting in others(job.dry).items():
            folder = job.folder / name
            train(folder, [*settings, setting, f"schedule.updates={3 if job.dry else 20}"], RECIPE)
            losses += rows(folder)
            job.figure(f"{name}: UperNet on dat_atto", rows(folder)[-1]["images_per_s"], "images/s")
    job.figure("losses not finite", sum(not math.isfinite(row["loss"]) for row in losses))
    if job.dry or job.left() > 80:
        speed(job)


def others(dry: bool) -> dict[str, str]:
    """Settings of the short trainings by their name."""
    # Without a GPU compilation takes longer than everything else.
    found = {} if dry else {"compiled": "train.compile=block"}
    if find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None:
        found["dali"] = "data.decoder=dali"
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


def speed(job: Job) -> None:
    """DAT-T beside Swin-T under UperNet at 512 x 512: images/s and peak memory."""
    file = job.folder / "speed.json"
    words = ["dat_tiny", "--norm", "sync", "--batch", "4", "--dtypes", "bf16", "--rounds", "5"]
    if job.dry:
        words = ["dat_atto", "--vs", "pvt_v2_b0", "--size", "64", "--batch", "2", "--classes", "5"]
        words += ["--channels", "16", "--rounds", "1"]
    command = [
        sys.executable,
        "-m",
        "benchmarks.dense_speed",
        *words,
        "--device",
        job.device,
        "--json",
        str(file),
    ]
    print("$", *command, flush=True)
    if code := subprocess.run(command).returncode:
        raise RuntimeError(f"benchmarks.dense_speed ended with exit code {code}")
    for row in json.loads(file.read_text(encoding="utf-8"))["measurements"]:
        where = f"{row['case']}: {row['name']}"
        job.figure(where, row["items"] / row["wall"][0], "images/s")
        job.figure(f"{where}, peak", row["extra"]["MB peak"], "MB")
