"""What the ranks exchange at a step boundary: one small all-reduce, and at log lines which rank was slowest."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from dattrain.data.to_device import to_device
from dattrain.engine.step import Update
from dattrain.runtime.collectives import all_gather, rank_and_world
from dattrain.runtime.signals import Preemption, StopRequest


@dataclass(frozen=True)
class StepStatus:
    """Status of an update, the same on every rank."""

    loss: float
    """Mean over the samples of the global batch; NaN where it was not finite on some rank."""
    finite: bool
    """Whether loss was finite on all ranks."""
    request: StopRequest
    save_failed: bool
    """Whether a background save has failed somewhere."""
    bad_samples: int
    """Skipped samples over all ranks, in this process's life."""
    log_due: bool = False
    """Whether it is time for a log line."""
    parts: dict[str, float] = field(default_factory=dict)
    """Named components of ``loss``, where the task has any; NaN where ``loss`` is."""


def stopped_by(preemption: Preemption, host: str) -> str:
    """What a request came from, and at several ranks where it arrived. Collective."""
    rank, world = rank_and_world()
    asked = all_gather((rank, host, preemption.why(look_for_file=rank == 0)))
    rank, host, why = next((each for each in asked if each[2]), (0, "", ""))
    return f"{why} at rank {rank} on {host}" if world > 1 and rank else why or "asked to end"


def reduce_status(
    update: Update,
    *,
    request: StopRequest,
    save_failed: bool,
    bad_samples: int,
    device: torch.device,
    log_due: bool = False,
) -> StepStatus:
    """Sum every rank's status. Collective. A flag that is up on one rank is up for all."""
    finite = math.isfinite(update.loss_sum)
    local = [
        update.loss_sum if finite else 0.0,
        update.weight,
        0.0 if finite else 1.0,
        1.0 if request == StopRequest.PREEMPT else 0.0,
        1.0 if request == StopRequest.STOP else 0.0,
        1.0 if save_failed else 0.0,
        float(bad_samples),
        1.0 if log_due else 0.0,
        *update.parts.values(),
    ]
    reduced = to_device(torch.tensor(local, dtype=torch.float64), device)
    dist.all_reduce(reduced)
    loss, weight, broken, preempt, stop, failed, bad, due, *parts = reduced.tolist()
    wanted = StopRequest.STOP if stop else StopRequest.PREEMPT if preempt else StopRequest.NONE
    mean, *means = (math.nan if broken else total / max(weight, 1.0) for total in (loss, *parts))
    return StepStatus(mean, not broken, wanted, failed > 0, int(bad), due > 0, dict(zip(update.parts, means)))


@dataclass(frozen=True)
class Slowest:
    """The rank that kept the others waiting."""

    rank: int
    host: str
    excess: float
    """How much longer than the median rank it took to read and run forward, as a share."""


class Stragglers:
    """Adds up each rank's own time and names the slowest rank. Collective: made on all ranks together."""

    def __init__(self, host: str, device: torch.device) -> None:
        self._device = device
        self._own = 0.0
        self.hosts: list[str] = [""] * dist.get_world_size()
        """Of each rank."""
        dist.all_gather_object(self.hosts, host)

    def add(self, update: Update) -> None:
        """Count one update."""
        self._own += update.own_s

    def slowest(self) -> Slowest | None:
        """The slowest rank since the last call, None for a single one. Collective."""
        own, self._own = self._own, 0.0
        if len(self.hosts) == 1:
            return None
        seconds = torch.zeros(len(self.hosts), dtype=torch.float64)
        seconds[dist.get_rank()] = own
        seconds = to_device(seconds, self._device)
        dist.all_reduce(seconds)
        seconds = seconds.cpu()  # the one read
        rank = int(seconds.argmax())
        median = float(seconds.median())
        excess = float(seconds[rank]) / median - 1 if median > 0 else 0.0
        return Slowest(rank, self.hosts[rank], excess)
