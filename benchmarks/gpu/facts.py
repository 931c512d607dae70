"""Stage ``facts``: what the machine is, how fast it multiplies and copies random data, and what ``dattrain doctor`` finds."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess

import torch

from benchmarks.gpu.job import Job
from dattrain.bench.attention import pick_device
from dattrain.cli.main import main as doctor
from dattrain.observe import roofline

ASKED = (
    "name",
    "driver_version",
    "memory.total",
    "clocks.max.sm",
    "clocks.sm",
    "power.limit",
    "temperature.gpu",
)


def run(job: Job) -> None:
    """Device, versions, ceilings, doctor."""
    device = pick_device(job.device)
    job.figure("python", platform.python_version())
    for name in ("torch", "triton", "deepspeed", "timm"):
        job.figure(name, version(name))
    if shutil.which("nvidia-smi"):
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        )
        for name, value in zip(ASKED, done.stdout.split("\n")[0].split(",")):
            job.figure(name, value.strip())
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        job.figure("compute capability", f"{found.major}.{found.minor}")
        job.figure("multiprocessors", found.multi_processor_count)
        job.figure("L2 cache", found.L2_cache_size / 1e6, "MB")
    # Many CPUs multiply bf16 a thousand times more slowly.
    for name, dtype in (("fp32", torch.float32), *([] if job.dry else [("bf16", torch.bfloat16)])):
        ceilings = roofline.measure(device, dtype)
        job.figure(f"matrix product, {name}, random data", ceilings.flops / 1e12, "TFLOP/s")
    job.figure("copy, read and written", ceilings.bytes / 1e12, "TB/s")
    file = job.folder / "doctor.json"
    code = doctor(["doctor", "--json", str(file)])
    wrong = [f"{k}: {v}" for k, v in json.loads(file.read_text()).items() if str(v).startswith("FAILED")]
    job.figure("dattrain doctor", "all well" if code == 0 else "; ".join(wrong)[:500])


def version(package: str) -> str:
    """Version of an installed package."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed(package)
    except PackageNotFoundError:
        return "not installed"
