"""One update: micro-batches in, weights changed, and the numbers that the ranks then agree on."""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dattrain.config.schema import Config
from dattrain.data.augment.mixup import MixupCutmix
from dattrain.data.batch import Batch
from dattrain.data.philox import Stream, uniform32
from dattrain.data.to_device import to_device

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "bf16-pure": torch.bfloat16, "fp16": torch.float16}
"""Dtype of the network's input by ``train.precision``; under autocast (``bf16``) the layers cast by themselves."""
COMPUTE = {**DTYPES, "bf16": torch.bfloat16}
"""Dtype of its matrix products."""


class Loader(Protocol):
    """What is needed of ``dattrain.data.loader.TrainLoader``."""

    @property
    def wait_s(self) -> float: ...

    def __next__(self) -> Batch: ...


@dataclass(frozen=True)
class Update:
    """What one rank knows after an update."""

    loss_sum: float
    """Sum of weight * cross-entropy over this rank's samples; not finite if any of them was not."""
    weight: float
    """Sum of the weights of this rank's samples."""
    applied: bool
    """Whether the weights changed; the same on all ranks."""
    grad_norm: float
    """Global norm before clipping; not finite where the update was skipped."""
    data_wait_s: float
    own_s: float
    """Seconds of reading and forward passes: what this rank needs before it meets the others."""
    keys: list[str]
    """Names of this rank's samples."""


class Updater:
    """Runs updates on a DeepSpeed engine.

    Args:
        engine: of ``zero.initialize``.
        config: the recipe.
        accumulation: micro-batches per rank and update.
        drop_path: residual branches that draw noise (``model.num_drop_path``), 0 for none.
        device: of the batches.
    """

    def __init__(
        self, engine: Any, config: Config, accumulation: int, drop_path: int, device: torch.device
    ) -> None:
        self.engine = engine
        self.accumulation = accumulation
        self.mixer = MixupCutmix(config.augment, config.model.num_classes)
        self._dtype = DTYPES[config.train.precision]
        self._micro_batch = config.train.micro_batch
        self._seed = config.train.seed
        self._drop_path = drop_path
        self._device = device
        self._channels_last = config.train.channels_last
        self._stage = config.zero.stage
        self._clock: _HostClock | _CudaClock = _CudaClock() if device.type == "cuda" else _HostClock()

    def __call__(self, loader: Loader, lr: float) -> Update:
        """Consume the next ``accumulation`` micro-batches and update the weights at rate ``lr``."""
        engine = self.engine
        for group in engine.basic_optimizer.param_groups:
            group["lr"] = lr
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        weight_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        keys: list[str] = []
        told: tuple[float, float, float] | None = None
        for micro in range(self.accumulation):
            batch = next(loader)
            keys += batch.keys
            with self._clock.running():
                loss, total, weight = self.forward(batch)
            engine.backward(loss)
            loss_sum += total
            weight_sum += weight
            if self._stage == 0 and micro == self.accumulation - 1:
                told = self._guard(loss_sum, weight_sum)
            engine.step()
        loss_seen, weight_seen, norm = told or _fetch(loss_sum, weight_sum, self._norm())
        waited = loader.wait_s
        return Update(
            loss_sum=loss_seen,
            weight=weight_seen,
            applied=math.isfinite(norm) if told else not self._overflowed(),
            grad_norm=norm,
            data_wait_s=waited,
            own_s=waited + self._clock.read(),
            keys=keys,
        )

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(loss to differentiate, sum of weight * cross-entropy in fp64, sum of weights in fp64).

        The first is divided by the micro-batch; accumulation and the mean over ranks, which DeepSpeed does, complete the
        division by the global batch. If it is not finite its gradients are made so too, lest an infinite loss with finite
        gradients be applied: the skip is then agreed by what reduces gradients, at no cost.
        """
        images, targets, weight = self.mixer(batch, self._dtype)
        if self._channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        noise = {}
        if self._drop_path:
            drawn = uniform32(self._seed, Stream.DROP_PATH, batch.position.numpy(), self._drop_path)
            noise["drop_path_noise"] = to_device(drawn, self._device)
        logits = self.engine(images, **noise)
        losses = weight * F.cross_entropy(logits.float(), targets, reduction="none")
        total = losses.sum()
        loss = total / self._micro_batch
        poison = torch.where(torch.isfinite(total.detach()), 1.0, float("nan"))
        return loss * poison, total.detach().double(), weight.sum().double()

    @torch.no_grad()
    def _guard(self, loss_sum: Tensor, weight_sum: Tensor) -> tuple[float, float, float]:
        """Stage 0: the update's numbers, with the norm of the reduced gradients; if that is not finite the step is told to do
        nothing."""
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else 0.0
        told = _fetch(loss_sum, weight_sum, norm)
        if not math.isfinite(told[2]):
            self.engine.basic_optimizer.skip_next()
        return told

    def _norm(self) -> Tensor | float:
        """Stages 1-3: the norm that DeepSpeed found; NaN where it skipped the update."""
        norm = None if self._overflowed() else self.engine.get_global_grad_norm()
        return math.nan if norm is None else norm

    def _overflowed(self) -> bool:
        """Stages 1-3: whether DeepSpeed skipped the update, after having agreed with the other ranks."""
        return bool(getattr(self.engine.optimizer, "overflow", False))


def _fetch(loss_sum: Tensor, weight_sum: Tensor, norm: Tensor | float) -> tuple[float, float, float]:
    """The three as Python numbers, in one read: each would wait for the device anew."""
    if isinstance(norm, Tensor) and norm.device == loss_sum.device:
        loss, weight, found = torch.stack((loss_sum, weight_sum, norm.double().reshape(()))).tolist()
        return loss, weight, found
    loss, weight = torch.stack((loss_sum, weight_sum)).tolist()
    return loss, weight, float(norm)  # on the host already


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
    """The same on the device; ``read`` waits for it, when the update's numbers were fetched and it has nothing to do."""

    def __init__(self) -> None:
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._marks.append((begin, end))

    def read(self) -> float:
        marks, self._marks = self._marks, []
        for _, end in marks:
            end.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in marks) / 1e3
