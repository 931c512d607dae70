"""Before a job begins: can its processes meet, reduce, and share a folder? What fails names the node.

``reach`` works before there is a process group; ``check`` within one. ``doctor`` and the job's start call both.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dattrain.errors import UserError
from dattrain.runtime.env import MEET, Env

_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Report:
    """What the checks found, the same on every rank."""

    world: int
    hosts: list[str]
    """Distinct host names in order of rank."""
    devices: int
    """Devices per process's view; the same everywhere."""
    all_reduce_ms: float
    """Median time to reduce 4 MiB."""
    all_reduce_gb_s: float
    """4 MiB over that time."""
    folder_ms: float
    """From the rename on one rank to its sight on all."""

    def lines(self) -> list[str]:
        """For people."""
        if self.world == 1:
            return [
                f"one process on {self.hosts[0]}, {self.devices} CUDA devices visible; the run folder can be written"
            ]
        return [
            f"{self.world} ranks on {len(self.hosts)} hosts: {', '.join(self.hosts)}",
            f"{self.devices} CUDA devices visible to each",
            f"all-reduce is right; 4 MiB in {self.all_reduce_ms:.1f} ms ({self.all_reduce_gb_s:.2f} GB/s)",
            f"run folder is one, renames are atomic and seen within {self.folder_ms:.0f} ms",
        ]


def reach(env: Env, timeout_s: float = 60.0) -> None:
    """Resolve the master's name and, on rank 0, see that its port can be opened. Before ``env.connect``.

    Raises:
        UserError: naming this node and what it could not do.
    """
    if env.world == 1:
        return
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.getaddrinfo(env.master_addr, env.master_port)
            break
        except OSError as error:
            # A node that has just booted may not have its resolver yet.
            if time.monotonic() > deadline:
                raise UserError(
                    f"{env.host}: the host of rank 0, {env.master_addr!r}, does not resolve ({error.strerror}); "
                    f"check /etc/hosts or DNS on this node. {MEET}"
                ) from error
            time.sleep(0.5)
    # torchrun's agent holds the port already.
    if env.rank == 0 and env.launcher != "torchrun":
        try:
            with socket.socket(socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", env.master_port))
        except OSError as error:
            raise UserError(
                f"{env.host}: port {env.master_port} cannot be opened ({error.strerror}); another job holds it. "
                "Set another MASTER_PORT for the ranks (environment in the cluster's profile)"
            ) from error


def check(env: Env, folder: Path, timeout_s: float = 60.0) -> Report:
    """Within the process group: gather, reduce, and rename a file in ``folder``. Collective.

    Raises:
        UserError: on every rank, naming each node on which something failed.
    """
    import torch
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    cuda = torch.cuda.is_available()
    mine: dict[str, Any] = {"host": env.host, "devices": torch.cuda.device_count() if cuda else 0}
    views: list[Any] = [None] * world
    dist.all_gather_object(views, mine)
    hosts = list(dict.fromkeys(view["host"] for view in views))
    counts = {view["host"]: view["devices"] for view in views}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{host}: {count}" for host, count in counts.items())
        raise UserError(f"the nodes do not see the same number of devices ({told})")
    problems: list[str] = []
    seconds = _all_reduce(
        torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"), problems
    )
    seen = _shared_folder(folder, rank, problems, timeout_s)
    failures: list[Any] = [None] * world
    dist.all_gather_object(failures, problems)
    named = [f"{views[r]['host']} (rank {r}): {text}" for r, texts in enumerate(failures) for text in texts]
    if named:
        raise UserError("; ".join(named))
    times = torch.tensor([seconds, seen], dtype=torch.float64)
    dist.all_reduce(times := times.to("cuda") if cuda else times, op=dist.ReduceOp.MAX)
    slowest, latest = times.tolist()
    return Report(
        world=world,
        hosts=hosts,
        devices=next(iter(counts.values())),
        all_reduce_ms=slowest * 1e3,
        all_reduce_gb_s=4 * _ELEMENTS / slowest / 1e9,
        folder_ms=latest * 1e3,
    )


def _all_reduce(device: Any, problems: list[str]) -> float:
    """Median seconds of reducing 4 MiB; a wrong sum is noted."""
    import torch
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    times = []
    for _ in range(5):
        values = torch.full((_ELEMENTS,), float(rank + 1), device=device)
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(values)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
        expected = world * (world + 1) / 2
        if not bool((values == expected).all()):
            problems.append(f"all-reduce gave {float(values[0])}, not {expected}")
            break
    return sorted(times)[len(times) // 2]


def _shared_folder(folder: Path, rank: int, problems: list[str], timeout_s: float) -> float:
    """Rank 0 renames a file into ``folder``; every rank must see it whole. Seconds until this one did."""
    import torch.distributed as dist

    held = [secrets.token_hex(8)]
    dist.broadcast_object_list(held, src=0)
    token = held[0]
    target = folder / f".preflight-{token}"
    if rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            aside = folder / f".preflight-{token}.part"
            aside.write_text(json.dumps({"token": token}), encoding="utf-8")
            os.replace(aside, target)
        except OSError as error:
            problems.append(f"{folder} cannot be written: {error.strerror}")
    dist.barrier()
    begin = time.perf_counter()
    found: object = None
    while time.perf_counter() - begin < (timeout_s if not problems else 0):
        try:
            found = json.loads(target.read_text(encoding="utf-8"))["token"]
            break
        except (OSError, ValueError, KeyError):
            time.sleep(0.05)
            # Network file systems cache the folder's listing; opening it anew is what refreshes that.
            if folder.is_dir():
                os.listdir(folder)
    if found != token and not problems:
        problems.append(f"{folder} is not the folder that rank 0 sees: a file that it put there is missing")
    dist.barrier()
    if rank == 0:
        target.unlink(missing_ok=True)
    return time.perf_counter() - begin


def as_json(report: Report) -> dict[str, Any]:
    """For logs."""
    return asdict(report)
