"""What is known of a step that was not finite: keys of its samples and norms per module."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dattrain.engine.step import Update
from dattrain.state.partition import MOMENTS, LocalState, read


def write_debug_dump(run_dir: Path, step: int, engine: Any, update: Update, rank: int) -> Path:
    """Write the folder ``health/step_N/``; returns it. Collective.

    ``rank_R.json`` holds the keys of each rank's samples and its loss, ``norms.json`` (of rank 0) the norm and largest
    magnitude of every parameter and of its Adam moments.
    """
    folder = run_dir / "health" / f"step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    local_facts = {
        "rank": rank,
        "loss_sum": _plain(update.loss_sum),
        "finite_loss": math.isfinite(update.loss_sum),
        "applied": update.applied,
        "grad_norm": _plain(update.grad_norm),
        "keys": update.keys,
    }
    (folder / f"rank_{rank}.json").write_text(json.dumps(local_facts, indent=1) + "\n", encoding="utf-8")
    found = norms(engine)
    if rank == 0:
        (folder / "norms.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return folder


@torch.no_grad()
def norms(engine: Any) -> dict[str, dict[str, float | int | None]]:
    """The norm, largest magnitude and number of non-finite elements of each parameter, and the norms of its moments. Collective.

    They are those of masters and moments as they are partitioned: nothing is gathered.
    """
    local = LocalState(engine)
    order = list(local.parameters)
    where = {name: i for i, name in enumerate(order)}
    device = local.masters[0].device if local.masters else torch.device("cpu")
    sums = torch.zeros(len(order), 4, dtype=torch.float64, device=device)
    peaks = torch.zeros(len(order), dtype=torch.float64, device=device)
    for fragment in local.fragments:
        lo, hi = fragment.saved
        for column, state in enumerate(("param", *MOMENTS)):
            tensor = local.tensor(fragment, state)
            if tensor is None or hi <= lo:
                continue
            values = read(tensor, fragment.offset + lo, hi - lo).to(device, torch.float64)
            finite = torch.isfinite(values)
            row = where[fragment.name]
            values = torch.where(finite, values, torch.zeros_like(values))
            sums[row, column] += values.square().sum()
            if state == "param":
                sums[row, 3] += (~finite).sum()
                peaks[row] = torch.maximum(peaks[row], values.abs().max())
    reduced = sums.to(_collective_device(device))
    dist.all_reduce(reduced)
    highest = peaks.to(reduced.device)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return {
        name: {
            "norm": math.sqrt(row[0]),
            "max": peak,
            "non_finite": int(row[3]),
            "exp_avg_norm": math.sqrt(row[1]),
            "exp_avg_sq_norm": math.sqrt(row[2]),
        }
        for name, row, peak in zip(order, reduced.tolist(), highest.tolist())
    }


def _collective_device(device: torch.device) -> torch.device:
    """Offloaded state lies on the CPU, where the process group may not reach."""
    if device.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
