"""One update: micro-batches in, weights changed, and the numbers that the ranks then reduce."""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dattrain.config.schema import Config
from dattrain.data.philox import Stream, uniform32
from dattrain.data.to_device import to_device
from dattrain.engine import precision
from dattrain.engine.running_statistics import RunningStatistics
from dattrain.tasks.base import Batch, Loss, Task


class Loader(Protocol):
    """What an update needs of a training loader."""

    @property
    def wait_s(self) -> float:
        """Seconds spent waiting for data since this was last read."""

    def __next__(self) -> Batch:
        """The next micro-batch."""


@dataclass(frozen=True)
class Update:
    """What one rank knows after an update."""

    loss_sum: float
    """Sum of weight * loss over this rank's samples; not finite if any of them was not."""
    weight: float
    """Sum of the weights of this rank's samples."""
    applied: bool
    """Whether the weights changed; the same on all ranks."""
    grad_norm: float
    """Global norm before clipping; not finite where the update was skipped."""
    data_wait_s: float
    own_s: float
    """Seconds of reading and forward passes: what this rank needs before it waits for the others."""
    keys: list[str]
    """Names of this rank's samples."""
    parts: dict[str, float] = field(default_factory=dict)
    """Named components of ``loss_sum``, where the task has any."""


class TrainStep:
    """Runs updates on a DeepSpeed engine.

    Attributes:
        statistics: the model's running statistics, to be averaged before they are saved or evaluated.

    Args:
        engine: of ``zero.initialize``.
        task: whose loss it is.
        config: the recipe.
        accumulation: micro-batches per rank and update.
        noise_width: numbers drawn for each sample (``Task.noise_width``).
        device: of the batches.
    """

    def __init__(
        self,
        engine: Any,
        task: Task,
        config: Config,
        accumulation: int,
        noise_width: int,
        device: torch.device,
    ) -> None:
        self.engine = engine
        self.task = task
        self.statistics = RunningStatistics(engine.module)
        self.accumulation = accumulation
        self._dtype = precision.WEIGHTS[config.train.precision]
        self._seed = config.train.seed
        self._noise_width = noise_width
        self._device = device
        self._stage = config.zero.stage
        self._clock: _HostClock | _CudaClock = _CudaClock() if device.type == "cuda" else _HostClock()

    def __call__(self, loader: Loader, lr: float) -> Update:
        """Consume the next ``accumulation`` micro-batches and update the weights at rate ``lr``."""
        engine = self.engine
        for group in engine.basic_optimizer.param_groups:
            group["lr"] = lr
        # Sums of loss and weight, then of the loss's parts.
        sums = [torch.zeros((), dtype=torch.float64, device=self._device) for _ in range(2)]
        names: list[str] = []
        keys: list[str] = []
        reduced: tuple[list[float], float] | None = None
        self.statistics.remember()
        for micro in range(self.accumulation):
            batch = next(loader)
            keys += batch.keys
            with self._clock.running():
                loss = self.forward(batch)
            engine.backward(loss.value)
            if micro == 0:
                names = sorted(loss.parts)
                sums += [torch.zeros_like(sums[0]) for _ in names]
            for total, value in zip(sums, (loss.total, loss.weight, *(loss.parts[name] for name in names))):
                total += value
            if self._stage == 0 and micro == self.accumulation - 1:
                reduced = self._guard(sums)
            engine.step()
        (loss_sum, weight, *parts), norm = reduced or _fetch(sums, self._norm())
        applied = math.isfinite(norm) if reduced else not self._overflowed()
        if not applied:
            self.statistics.restore()
        waited = loader.wait_s
        return Update(
            loss_sum=loss_sum,
            weight=weight,
            applied=applied,
            grad_norm=norm,
            data_wait_s=waited,
            own_s=waited + self._clock.read(),
            keys=keys,
            parts=dict(zip(names, parts)),
        )

    def forward(self, batch: Batch) -> Loss:
        """The task's loss of a micro-batch.

        Accumulation and the mean over ranks, which DeepSpeed does, complete the division by the global batch. If the loss is
        not finite its gradients are made so too, lest an infinite loss with finite gradients be applied: the skip is then
        agreed on by what reduces gradients, at no cost.
        """
        noise = None
        if self._noise_width:
            drawn = uniform32(self._seed, Stream.DROP_PATH, batch.position.numpy(), self._noise_width)
            noise = to_device(drawn, self._device)
        loss = self.task.loss(self.engine, batch, noise=noise, dtype=self._dtype)
        nan_if_nonfinite = torch.where(torch.isfinite(loss.total), 1.0, float("nan"))
        return replace(loss, value=loss.value * nan_if_nonfinite)

    @torch.no_grad()
    def _guard(self, sums: list[Tensor]) -> tuple[list[float], float]:
        """Stage 0: the update's numbers, with the norm of the reduced gradients; if that is not finite the step does nothing."""
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else 0.0
        fetched = _fetch(sums, norm)
        if not math.isfinite(fetched[1]):
            self.engine.basic_optimizer.skip_next()
        return fetched

    def _norm(self) -> Tensor | float:
        """Stages 1-3: the norm that DeepSpeed found; NaN where it skipped the update."""
        norm = None if self._overflowed() else self.engine.get_global_grad_norm()
        return math.nan if norm is None else norm

    def _overflowed(self) -> bool:
        """Stages 1-3: whether DeepSpeed skipped the update, after having agreed with the other ranks."""
        return bool(getattr(self.engine.optimizer, "overflow", False))


def _fetch(sums: list[Tensor], norm: Tensor | float) -> tuple[list[float], float]:
    """``sums`` and ``norm`` as Python numbers, in one read: each would wait for the device anew."""
    if isinstance(norm, Tensor) and norm.device == sums[0].device:
        *values, found = torch.stack((*sums, norm.double().reshape(()))).tolist()
        return values, found
    return torch.stack(sums).tolist(), float(norm)  # the norm is on the host already


def seed_all(seed: int, samples_seen: int, rank: int) -> None:
    """Seed torch, numpy and ``random`` from the position, so there is no generator state to save.

    Only what draws by itself (dropout) notices; the order, augmentation and drop path have generators of their own.
    """
    digest = hashlib.blake2b(f"{seed}/{samples_seen}/{rank}".encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "big")
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)


class _HostClock:
    """Seconds between entering and leaving ``running``."""

    def __init__(self) -> None:
        self._spent = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._spent += time.perf_counter() - begin

    def read(self) -> float:
        spent, self._spent = self._spent, 0.0
        return spent


class _CudaClock:
    """Seconds on the device; ``read`` waits for it, when the update's numbers were fetched and it has nothing to do."""

    def __init__(self) -> None:
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        event: Any = torch.cuda.Event  # untyped
        begin, end = (event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._marks.append((begin, end))

    def read(self) -> float:
        marks, self._marks = self._marks, []
        for _, end in marks:
            end.synchronize()
        return float(sum(begin.elapsed_time(end) for begin, end in marks)) / 1e3
