"""Before a job begins: can its processes reach each other, reduce, and save into one folder? What fails names the node.

``reach`` works before there is a process group; ``check`` within one. ``doctor`` and the job's start call both.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from dattrain.errors import UserError
from dattrain.files import Failed, doing, reason, sync
from dattrain.runtime import collectives
from dattrain.runtime.environment import RENDEZVOUS_HINT, Env

_ELEMENTS = 1 << 20
_VISIBLE_S = 60.0
"""Seconds in which every rank must see what rank 0 has renamed."""
_LOOK_S, _LONGEST_S = 0.05, 2.0
"""Between the first two looks for that, and at most: each time twice as long, since all ranks look, and each lists a folder."""


@dataclass(frozen=True)
class PreflightResult:
    """What the checks found, the same on every rank."""

    world: int
    hosts: list[str]
    """Distinct host names in order of rank."""
    devices: int
    """CUDA devices that each process sees; the same everywhere."""
    all_reduce_ms: float
    """Median time to reduce 4 MiB."""
    all_reduce_gb_s: float
    """4 MiB over that time."""
    folder_ms: float
    """Time from the rename of a folder on one rank until all see it."""

    def lines(self) -> list[str]:
        """Lines for people."""
        if self.world == 1:
            return [
                f"one process on {self.hosts[0]}, {self.devices} CUDA devices visible; the run folder takes what a save does: "
                "files and folders are written, synced and renamed"
            ]
        return [
            f"{self.world} ranks on {len(self.hosts)} hosts: {', '.join(self.hosts)}",
            f"{self.devices} CUDA devices visible to each",
            f"all-reduce is right; 4 MiB in {self.all_reduce_ms:.1f} ms ({self.all_reduce_gb_s:.2f} GB/s)",
            f"run folder is one and takes what a save does: files and folders are written, synced and renamed, and seen by all "
            f"within {self.folder_ms:.0f} ms",
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
                    f"check /etc/hosts or DNS on this node. {RENDEZVOUS_HINT}"
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


def check(env: Env, folder: Path) -> PreflightResult:
    """Gather, reduce, and do what a save does in ``folder/checkpoints``, within the process group. Collective.

    Leaves nothing there, but an empty ``checkpoints`` where that failed.

    Raises:
        UserError: on every rank, naming each node on which something failed.
    """
    world = dist.get_world_size()
    cuda = torch.cuda.is_available()
    views = collectives.all_gather({"host": env.host, "devices": torch.cuda.device_count() if cuda else 0})
    hosts = list(dict.fromkeys(view["host"] for view in views))
    counts = {view["host"]: view["devices"] for view in views}
    if len(set(counts.values())) > 1:
        counted = ", ".join(f"{host}: {count}" for host, count in counts.items())
        raise UserError(f"the nodes do not see the same number of devices ({counted})")
    problems: list[str] = []
    seconds = _all_reduce(
        torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"), problems
    )
    seen = _save(folder, env, problems)
    failures = collectives.all_gather(problems)
    named = [f"{views[r]['host']} (rank {r}): {text}" for r, texts in enumerate(failures) for text in texts]
    if named:
        raise UserError("; ".join(named))
    times = torch.tensor([seconds, seen], dtype=torch.float64)
    dist.all_reduce(times := times.to("cuda") if cuda else times, op=dist.ReduceOp.MAX)
    slowest, latest = times.tolist()
    return PreflightResult(
        world=world,
        hosts=hosts,
        devices=next(iter(counts.values())),
        all_reduce_ms=slowest * 1e3,
        all_reduce_gb_s=4 * _ELEMENTS / slowest / 1e9,
        folder_ms=latest * 1e3,
    )


def _all_reduce(device: torch.device, problems: list[str]) -> float:
    """Median seconds of reducing 4 MiB; a wrong sum is noted."""
    rank, world = dist.get_rank(), dist.get_world_size()
    times = []
    for _ in range(5):
        values = torch.full((_ELEMENTS,), _share(rank), device=device)
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(values)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
        expected = sum(map(_share, range(world)))
        if not bool((values == expected).all()):
            problems.append(f"all-reduce gave {float(values[0])}, not {expected}")
            break
    return sorted(times)[len(times) // 2]


def _share(rank: int) -> float:
    """What a rank gives: fp32 holds every sum of them exactly, up to 130,000 ranks."""
    return float(rank % 256 + 1)


def _save(folder: Path, env: Env, problems: list[str]) -> float:
    """Do in ``folder/checkpoints`` what a save does; returns the seconds until this rank saw it. Collective.

    Each node writes and syncs a file in a folder, which rank 0 syncs, renames and removes; every rank must see it under its
    new name.
    """
    rank = dist.get_rank()
    root = folder / "checkpoints"
    token = collectives.broadcast(secrets.token_hex(8))
    # Names that ``state.format.checkpoint.recover`` removes, should this process be killed here.
    staging, published = root / f".new-preflight-{token}", root / f".gone-preflight-{token}"
    made = False
    if rank == 0:
        with _noted(folder, problems), doing("folders cannot be made"):
            made = not root.exists()
            root.mkdir(parents=True, exist_ok=True)
            staging.mkdir()
    if collectives.broadcast(not problems) and env.local_rank == 0:
        with _noted(root, problems):
            _write(staging, f"rank_{rank:05d}", token)
    dist.barrier()
    if rank == 0 and not problems:
        with _noted(root, problems):
            with doing("folders cannot be synced (fsync)"):
                sync(staging)
            with doing("folders cannot be renamed"):
                os.rename(staging, published)
            with doing("folders cannot be synced (fsync)"):
                sync(root)
    begin = time.perf_counter()
    if collectives.broadcast(not problems):
        _look(published / "rank_00000", token, problems)
    seconds = time.perf_counter() - begin
    dist.barrier()
    if rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
        if published.exists():
            with _noted(root, problems), doing("folders cannot be removed"):
                shutil.rmtree(published)
        if made and not problems:
            with contextlib.suppress(OSError):
                root.rmdir()
    return seconds


def _write(folder: Path, name: str, text: str) -> None:
    part = folder / f"{name}.part"
    with doing("files cannot be written"), open(part, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        with doing("files cannot be synced (fsync)"):
            os.fsync(file.fileno())
    with doing("files cannot be renamed"):
        os.rename(part, folder / name)


def _look(path: Path, token: str, problems: list[str]) -> None:
    end, pause = time.perf_counter() + _VISIBLE_S, _LOOK_S
    while True:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if path.read_text(encoding="utf-8") == token:
                return
        if time.perf_counter() > end:
            break
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_S)
        # Network file systems cache a folder's listing; opening it anew is what refreshes that.
        with contextlib.suppress(OSError):
            os.listdir(path.parents[1])
    problems.append(f"{path.parents[1]} is not the folder that rank 0 sees: what it put there is missing")


@contextlib.contextmanager
def _noted(place: Path, problems: list[str]) -> Iterator[None]:
    try:
        yield
    except Failed as error:
        problems.append(
            f"{error.operation} in {place} ({reason(error)}): a checkpoint is written and synced under another name and "
            "published by renaming its folder; choose a --run folder on a file system where that works"
        )
