"""What this machine has and whether it works: versions, devices, ranks, attention, DALI, Slurm, disk. ``doctor`` prints it.

Each check imports what it looks at, so that one that is broken here does not take the others with it.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from dattrain.errors import UserError

if TYPE_CHECKING:
    from dattrain.runtime.environment import Env

PACKAGES = (
    "torch",
    "torchvision",
    "deepspeed",
    "timm",
    "webdataset",
    "submitit",
    "triton",
    "nvidia-dali-cuda130",
)


def versions() -> dict[str, str]:
    """Versions of Python, of dattrain and of what it stands on."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in ("dattrain", *PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def devices() -> list[str]:
    """CUDA devices, or the CPU."""
    import torch

    from dattrain.runtime.environment import emulates_bf16

    if not torch.cuda.is_available():
        bf16 = (
            "bf16: emulated, slower than fp32: use train.precision=fp32"
            if emulates_bf16()
            else "bf16: by the CPU"
        )
        return [f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads; {bf16}; no CUDA device"]
    found = [f"CUDA {torch.version.cuda}, driver through torch; bf16: {torch.cuda.is_bf16_supported()}"]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(f"{torch.cuda.get_device_name(index)}: {total / 1e9:.1f} GB, {free / 1e9:.1f} GB free")
    return found


def attention() -> list[str]:
    """The backends of the deformable attention, and which one is taken."""
    import torch

    from dattrain import ops

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = [
        " ".join(
            str(part)
            for part in (status.name, "-", "usable" if status.available else "not usable:", status.why)
        )
        for status in ops.backends()
    ]
    q = torch.zeros(1, 2, 4, 8, device=device)
    k = torch.zeros(1, 2, 3, 8, device=device)
    out = ops.deform_attention(q, k, k, torch.zeros(1, 1, 3, 2, device=device), None, height=2, width=2)
    if not bool((out == 0).all()):
        raise UserError("attention over zeros is not zero")
    return found


def dali() -> list[str]:
    """Whether DALI can be imported, and who decodes JPEGs on each kind of GPU here (tried in a child process)."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return ["not installed (in the checkout: pip install -e '.[dali]'); data.decoder=cpu works without"]
    import torch

    from dattrain.config.data_sections import Data
    from dattrain.data.decode import dali_probe
    from dattrain.data.decode.dali_pipeline import device_of

    if not torch.cuda.is_available():
        return [f"{dali_probe.versions()}; decodes on the CPU alone: no CUDA device"]
    kinds = {torch.cuda.get_device_name(index): index for index in reversed(range(torch.cuda.device_count()))}
    return [
        dali_probe.versions(),
        *(f"{kind}: {dali_probe.probe(device_of(index, Data()))}" for kind, index in kinds.items()),
    ]


def slurm() -> list[str]:
    """Whether Slurm's commands are here, and what its controller says."""
    if shutil.which("sbatch") is None:
        return ["no sbatch here: dattrain submit needs it, or --cluster local"]
    partitions = _output("sinfo", "-h", "-o", "%P %D nodes %a, %l, gres %G")
    if partitions is None:
        return ["sbatch is here, but no controller answers (sinfo failed); --cluster local works without"]
    accounting = _output("sacct", "-n", "-X", "-S", "now") is not None
    return [
        _output("sinfo", "--version") or "unknown version",
        *(partitions.splitlines() or ["no partition"]),
        "accounting (sacct): " + ("there" if accounting else "not there; squeue will do"),
    ]


def disk(folder: Path | None) -> list[str]:
    """Room for runs, and shared memory for data workers."""
    found = []
    for path, what in (
        (folder or Path.cwd(), "run folder"),
        (Path("/dev/shm"), "shared memory"),
        (Path(tempfile.gettempdir()), "temporary"),
    ):
        if path.exists():
            usage = shutil.disk_usage(path)
            found.append(f"{what} {path}: {usage.free / 1e9:.1f} GB free of {usage.total / 1e9:.1f}")
    return found


def _output(*command: str) -> str | None:
    """What a command printed; None where it is missing or failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def ranks(env: Env, folder: Path | None) -> list[str]:
    """An all-reduce over all ranks, and whether each sees what another writes into ``folder`` (None: one that is thrown away)."""
    from dattrain.runtime import environment, preflight

    given = folder is not None
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="dattrain-doctor-")) if env.world == 1 else Path.cwd()
    try:
        preflight.reach(env)
        with environment.process_group(env, environment.pick_device(env), 120.0):
            lines = preflight.check(env, folder).lines()
    finally:
        if not given and env.world == 1:
            shutil.rmtree(folder, ignore_errors=True)
    return [f"started by: {env.launcher}", *lines]
