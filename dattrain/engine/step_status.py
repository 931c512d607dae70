"""What the ranks tell each other at a step's edge: one small all-reduce, and at log lines who was slowest."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dattrain.data.to_device import to_device
from dattrain.engine.step import Update
from dattrain.runtime.signals import StopRequest


@dataclass(frozen=True)
class Edge:
    """The same on every rank."""

    loss: float
    """Mean over the samples of the global batch; NaN where it was not finite on some rank."""
    finite: bool
    """Whether loss was finite on all ranks."""
    request: StopRequest
    save_failed: bool
    """Whether a background save has failed somewhere."""
    bad_samples: int
    """Skipped samples over all ranks, in this process's life."""


def agree(
    update: Update, *, request: StopRequest, save_failed: bool, bad_samples: int, device: torch.device
) -> Edge:
    """Sum over ranks. Collective. A flag that is up on one rank is up for all."""
    finite = math.isfinite(update.loss_sum)
    mine = [
        update.loss_sum if finite else 0.0,
        update.weight,
        0.0 if finite else 1.0,
        1.0 if request == StopRequest.PREEMPT else 0.0,
        1.0 if request == StopRequest.STOP else 0.0,
        1.0 if save_failed else 0.0,
        float(bad_samples),
    ]
    told = to_device(torch.tensor(mine, dtype=torch.float64), device)
    dist.all_reduce(told)
    loss, weight, broken, preempt, stop, failed, bad = told.tolist()
    wanted = StopRequest.STOP if stop else StopRequest.PREEMPT if preempt else StopRequest.NONE
    mean = math.nan if broken else loss / max(weight, 1.0)
    return Edge(mean, not broken, wanted, failed > 0, int(bad))


@dataclass(frozen=True)
class Slowest:
    """Who kept the others waiting."""

    rank: int
    host: str
    excess: float
    """How much longer than the median rank it took to read and run forward, as a share."""


class Stragglers:
    """Adds up each rank's own time and names the slowest rank. Collective: made on all ranks together."""

    def __init__(self, host: str, device: torch.device) -> None:
        self._device = device
        self._own = 0.0
        self._hosts: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(self._hosts, host)

    def add(self, update: Update) -> None:
        """Count one update."""
        self._own += update.own_s

    def slowest(self) -> Slowest | None:
        """Since the last call. Collective. None for a single rank."""
        own, self._own = self._own, 0.0
        if len(self._hosts) == 1:
            return None
        told = torch.zeros(len(self._hosts), dtype=torch.float64)
        told[dist.get_rank()] = own
        told = to_device(told, self._device)
        dist.all_reduce(told)
        told = told.cpu()  # the one read
        rank = int(told.argmax())
        median = float(told.median())
        return Slowest(rank, self._hosts[rank], float(told[rank]) / median - 1 if median > 0 else 0.0)
