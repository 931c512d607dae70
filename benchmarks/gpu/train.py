"""Stage ``train``: real trainings on the device, of the demo's recipe on Fashion-MNIST.

In deterministic mode: one that is never disturbed, one that is killed with SIGKILL and started again, one that saves in the
foreground; all three must end with the same bits. Then 20 updates each in fp16 and in bf16-pure.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.gpu.job import Job
from dattrain.bench.attention import pick_device
from dattrain.runtime import environment

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "demo" / "pretrain.yaml"


def run(job: Job) -> None:
    """Train, kill, resume, compare."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    steps, every = (4, 1) if job.dry else (60, 10)
    settings = [*pack(job.folder, 32 if job.dry else 2048), "train.deterministic=true", "schedule.epochs=30"]
    settings += [f"train.max_steps={steps}", f"checkpoint.every_steps={every}"]
    settings += ["train.log_every=1000", "schedule.warmup_epochs=1", "train.ema_decay=0.99"]
    if job.dry:
        settings += ["train.global_batch=4", "train.micro_batch=2", "data.workers=0"]
        settings += ["model.img_size=32", "train.precision=fp32", "train.activation_checkpointing=none"]
    killed = job.folder / "killed"
    job.figure("killed behind the save of step", kill(killed, settings))
    with patched(job.dry), environment.process_group(environment.resolve({}), pick_device(job.device)):
        train(killed, settings)
        job.figure("resumed", resumed(killed), "times")
        whole, foreground = job.folder / "whole", job.folder / "foreground"
        train(whole, settings)
        job.figure("tensors that differ after SIGKILL and resume", differing(whole, killed, steps))
        train(foreground, [*settings, "checkpoint.background=false"])
        job.figure(
            "tensors that differ between background and foreground saves", differing(whole, foreground, steps)
        )
        for precision in ("fp16", "bf16-pure"):
            folder = job.folder / precision
            changed = [
                f"train.precision={precision}",
                "train.deterministic=false",
                "checkpoint.every_steps=1000",
            ]
            train(folder, [*settings, *changed, f"train.max_steps={2 if job.dry else 20}"])
            found = rows(folder)
            job.figure(
                f"losses not finite in {precision}", sum(not math.isfinite(row["loss"]) for row in found)
            )
            job.figure(f"updates skipped in {precision}", found[-1]["skipped_steps"])
    rate = [row["images_per_s"] for row in rows(whole)]
    job.figure("dat_atto, deterministic", rate[-1], "images/s")


def pack(folder: Path, count: int) -> list[str]:
    """The first images of Fashion-MNIST as shards in ``folder``; the overrides that name them."""
    import numpy as np

    from dattrain.cli.main import main

    source = ROOT / "dattrain" / "demo"
    images, labels = (
        np.frombuffer(
            gzip.decompress((source / f"t10k-{name}-ubyte.gz").read_bytes()), np.uint8, offset=offset
        )
        for name, offset in (("images-idx3", 16), ("labels-idx1", 8))
    )
    images = images.reshape(-1, 28, 28)
    np.savez(folder / "train.npz", images=images[:count], labels=labels[:count])
    words = ["data", "pack", str(folder / "train.npz"), str(folder / "train"), "--split", "train"]
    if code := main([*words, "--per-shard", "128", "--jobs", "1"]):
        raise RuntimeError(f"dattrain {' '.join(words)} ended with exit code {code}")
    return [f"data.train={folder}/train", f"data.lanes={min(16, count // 16)}"]


def command(run: Path, settings: Sequence[str], recipe: Path = RECIPE) -> subprocess.Popen[bytes]:
    """``dattrain train``, in the process group of this stage, so that it cannot outlive it."""
    return subprocess.Popen(
        [sys.executable, "-m", "dattrain", "train", str(recipe), *settings, "--run", str(run)]
    )


def kill(run: Path, settings: Sequence[str], recipe: Path = RECIPE) -> int:
    """Start a training and SIGKILL it as soon as its first checkpoint is published; the step that this was of.

    Raises:
        RuntimeError: it ended by itself.
    """
    process = command(run, settings, recipe)
    while process.poll() is None and not (
        found := sorted((run / "checkpoints").glob("step_*/manifest.json"))
    ):
        time.sleep(0.01)
    if process.poll() is not None:
        raise RuntimeError(
            f"the training ended with exit code {process.returncode} before it could be killed"
        )
    process.send_signal(signal.SIGKILL)
    process.wait()
    return int(found[-1].parent.name.removeprefix("step_"))


def resumed(run: Path) -> int:
    """How often the run said that it goes on from a checkpoint."""
    return sum(
        text.count("resumed from")
        for text in (p.read_text(errors="replace") for p in (run / "logs").glob("*"))
    )


def train(run: Path, settings: Sequence[str], recipe: Path = RECIPE) -> None:
    """A training in this process.

    Raises:
        UserError: as ``engine.train.train``.
    """
    from dattrain.config.load import load
    from dattrain.engine.train import train

    train(load(recipe, list(settings)).config, run)


def rows(run: Path) -> list[dict[str, Any]]:
    """The updates of a run."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in found if "loss" in row]


def differing(a: Path, b: Path, at: int) -> int:
    """Tensors of two runs' checkpoints of ``step`` (weights, moments, averages, buffers) that differ in any bit."""
    one, other = states(a, at), states(b, at)
    different = [
        name for name in one.keys() | other.keys() if name not in one or one[name] != other.get(name)
    ]
    print(
        f"{a.name} and {b.name}: {len(different)} of {len(one)} differ {sorted(different)[:10]}", flush=True
    )
    return len(different)


def states(run: Path, at: int) -> Mapping[str, tuple[Any, ...]]:
    """Shape, dtype and bytes of everything that the checkpoint of step ``at`` holds, checked against its checksums."""
    from dattrain.state import gather
    from dattrain.state.format import checkpoint

    folder = run / "checkpoints" / checkpoint.folder_name(at)
    manifest = checkpoint.verify(folder)
    found = {
        f"{s}/{n}": t
        for s in get_args(gather.State)
        if s in manifest.states
        for n, t in gather.iter_tensors(folder, s)
    }
    found |= {f"buffer/{n}": t for n, t in gather.load_buffers(folder).items()}
    return {
        n: (t.shape, t.dtype, t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for n, t in found.items()
    }


class patched:
    """On a CPU DeepSpeed refuses fp16, whose arithmetic torch has there all the same: inside the block it does not."""

    def __init__(self, active: bool) -> None:
        self._active = active

    def __enter__(self) -> None:
        if self._active:
            from deepspeed.accelerator import get_accelerator

            self._kept = get_accelerator().is_fp16_supported
            get_accelerator().is_fp16_supported = lambda: True

    def __exit__(self, *_: object) -> None:
        if self._active:
            from deepspeed.accelerator import get_accelerator

            get_accelerator().is_fp16_supported = self._kept
