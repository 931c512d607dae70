"""Starts the ranks of ``state_worker.py`` and the like, and compares what they left."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from state_worker import Job

from dattrain.state import gather
from dattrain.state.format import checkpoint

HERE = Path(__file__).parent


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def spawn(world: int, command: Sequence[str], **environment: str) -> list[subprocess.Popen[str]]:
    """Start ``world`` ranks of ``python *command``, each in its own process group."""
    import warm  # The scripts that use the rest are started without tests/ on their path.

    port = free_port()
    base = {
        **os.environ,
        "PYTHONWARNINGS": "ignore",
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE.parent.parent),
        **environment,
    }
    return [
        warm.Popen(
            [sys.executable, *command],
            env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in range(world)
    ]


def finished(ranks: Sequence[subprocess.Popen[str]], timeout: float = 1200.0) -> list[str]:
    """Wait for all ranks, end the others as soon as one fails; their outputs. Raises AssertionError with them on failure."""
    deadline = time.monotonic() + timeout
    outputs = [""] * len(ranks)

    def collect(i: int) -> None:
        outputs[i] = ranks[i].communicate()[0]

    readers = [threading.Thread(target=collect, args=(i,), daemon=True) for i in range(len(ranks))]
    for reader in readers:
        reader.start()
    while (
        any(r.poll() is None for r in ranks)
        and not any(r.poll() for r in ranks)
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    failed = [i for i, r in enumerate(ranks) if r.poll() != 0]
    for rank in ranks:
        rank.kill()
    for reader in readers:
        reader.join()
    if failed:
        raise AssertionError(
            "\n".join(
                f"--- rank {i}{' (failed)' if i in failed else ''} ---\n{o[-4000:]}"
                for i, o in enumerate(outputs)
            )
        )
    return outputs


def run(world: int, jobs: Sequence[Job], tmp: Path) -> list[dict[str, Any]]:
    """Run ``jobs`` one after another on ``world`` ranks; returns what each left."""
    plan = tmp / f"plan_{free_port()}.json"
    plan.write_text(json.dumps([dataclasses.asdict(j) for j in jobs]))
    try:
        finished(spawn(world, [str(HERE / "state_worker.py"), str(plan)]))
    except AssertionError as e:
        if "EADDRINUSE" not in str(e):
            raise
        finished(
            spawn(world, [str(HERE / "state_worker.py"), str(plan)])
        )  # the port was taken after we had found it free
    return [json.loads(Path(j.out).read_text()) for j in jobs]


def states(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything that the checkpoint of ``step`` holds, by state and name."""
    folder = run_dir / "checkpoints" / checkpoint.folder_name(step)
    manifest = checkpoint.verify(folder)
    found = {f"{s}/{n}": t for s in manifest.states for n, t in gather.iter_tensors(folder, s)}
    found.update({f"buffer/{n}": t for n, t in gather.load_buffers(folder).items()})
    return found


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Equal to the bit, tensor by tensor."""
    assert a.keys() == b.keys()
    different = [
        k
        for k in a
        if not torch.equal(
            a[k].view(torch.uint8) if a[k].ndim else a[k], b[k].view(torch.uint8) if b[k].ndim else b[k]
        )
    ]
    assert not different, different
