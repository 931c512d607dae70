"""Stage ``augment``: RandAugment and colour jitter on the device's whole batch against the same on the CPU, bit for bit."""

from __future__ import annotations

import time
from itertools import product
from typing import Literal

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu.job import Job
from dattrain.bench.attention import pick_device
from dattrain.config.data_sections import Augment
from dattrain.data.augment.device_transforms import augment as carry_out
from dattrain.data.augment.plan import draw

POLICIES = ("rand-m9-n3-mstd0.5-inc1", "rand-m9-mstd0.5")
INTERPOLATIONS: tuple[Literal["bicubic", "bilinear"], ...] = ("bicubic", "bilinear")


def run(job: Job) -> None:
    """Both policies, both interpolations, on smooth and noisy images of 224 x 224."""
    device = pick_device(job.device)
    size, count = ((32, 32), 8) if job.dry else ((224, 224), 256)
    differ = total = 0
    for number, (policy, interpolation) in enumerate(product(POLICIES, INTERPOLATIONS)):
        settings = Augment(randaugment=policy, color_jitter=0.4, interpolation=interpolation)
        plan = draw(settings, number, np.arange(count), size)
        images, every = pictures(count, size, number), np.ones(count, dtype=bool)
        expected, pixels = images.clone(), images.to(device, copy=True)
        carry_out(expected, plan, every)
        carry_out(pixels, plan, every)
        different = (pixels.cpu() != expected).flatten(1).any(1)
        differ, total = differ + int(different.sum()), total + count
        print(f"{policy} {interpolation}: {int(different.sum())} of {count} differ", flush=True)
    job.figure("images compared", total)
    job.figure("images that differ from the CPU's", differ)
    job.figure(
        "changed by the policy", int((expected != images).flatten(1).any(1).sum()), "of the last batch"
    )
    batch = pixels[: min(count, 128)]
    plan = draw(settings, 9, np.arange(len(batch)), size)
    rounds, every = 1 if job.dry else 10, np.ones(len(batch), dtype=bool)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    carry_out(batch, plan, every)
    wait()
    begin = time.perf_counter()
    for _ in range(rounds):
        carry_out(batch, plan, every)
    wait()
    job.figure(POLICIES[-1], rounds * len(batch) / (time.perf_counter() - begin), "images/s")


def pictures(count: int, size: tuple[int, int], seed: int) -> torch.Tensor:
    """Smooth ones with noise on every second: count x H x W x 3 uint8."""
    rng = np.random.default_rng(seed)
    out = np.empty((count, *size, 3), np.uint8)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
        out[i] = np.clip(smooth + (i % 2) * rng.integers(-40, 41, smooth.shape), 0, 255)
    return torch.from_numpy(out)
