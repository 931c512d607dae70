"""The stages in their order: what tells most comes first, since lent devices come in minutes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """``module`` has a function ``function(job)``; ``seconds`` is the limit of its process."""

    name: str
    module: str
    function: str
    seconds: int
    about: str


STAGES: tuple[Stage, ...] = (
    Stage("facts", "facts", "run", 40, "device, driver, versions, ceilings on random data, dattrain doctor"),
    Stage(
        "kernels",
        "kernels",
        "run",
        180,
        "every case of the Triton core against the equations, each twice, in as many processes as cores",
    ),
    Stage(
        "core",
        "core",
        "run",
        240,
        "microseconds of the core at 8 layers, beside three formulations and the bound",
    ),
    Stage("model", "models", "tiny", 240, "DAT-T beside Swin-T, both compiled"),
    Stage(
        "train",
        "train",
        "run",
        180,
        "SIGKILL and exact resume, saves in background and foreground, fp16 and bf16-pure",
    ),
    Stage(
        "dense",
        "dense",
        "segmentation",
        240,
        "segmentation: SIGKILL and exact resume with SyncBatchNorm, compiled, from DALI; UperNet on DAT-T beside Swin-T",
    ),
    Stage(
        "detect",
        "dense",
        "detection",
        240,
        "detection: SIGKILL and exact resume of RetinaNet, Mask R-CNN and its cascade; Mask R-CNN on DAT-T beside Swin-T",
    ),
    Stage("step", "updates", "parts", 120, "an update of DAT-T taken apart, compiled, with CUDA graphs"),
    Stage("waits", "waits", "run", 90, "where the host waits for the device in an update"),
    Stage(
        "memory",
        "updates",
        "memory",
        60,
        "peak memory and images/s with every kind of activation checkpointing",
    ),
    Stage("augment", "augment", "run", 90, "RandAugment on the device against the CPU, bit for bit"),
    Stage("dali", "dali", "run", 90, "DALI's decoder on three kinds of JPEG, each in a process of its own"),
    Stage("checkpoint", "updates", "checkpoint", 90, "what a background save costs beside a blocking one"),
    Stage(
        "table", "models", "table", 240, "images/s and peak memory of DAT, DAT++, Swin and ViT at 224 and 384"
    ),
    Stage("large", "models", "large", 300, "DAT-B at 384 beside the straightforward core, both compiled"),
    Stage("largest", "updates", "largest", 90, "the largest micro-batch that fits"),
    Stage("cpu", "models", "cpu", 200, "DAT-T beside Swin-T on the host's processor"),
    Stage("sanitizer", "tools", "sanitizer", 120, "compute-sanitizer's memcheck on small cases"),
    Stage("counters", "tools", "counters", 120, "Nsight Compute's counters of the core's kernels"),
    Stage("tests", "tools", "tests", 300, "pytest -m gpu"),
)
