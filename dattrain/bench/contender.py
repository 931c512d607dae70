"""The contenders of ``dattrain bench step``: a session with batches from memory, whose call is one update; and its memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dattrain.bench.step_parts import replaced
from dattrain.config.derive import derive
from dattrain.config.schema import Config
from dattrain.engine import compile as compiling
from dattrain.engine.session import Session, open_session
from dattrain.errors import ConfigError, UserError
from dattrain.tasks.base import Batch
from dattrain.tasks.create import create_task

BASELINE = "recipe"
BATCHES = 4
"""Different micro-batches that the updates run through."""
SETTLE = 20
"""Updates after which a loss scale must have found its level."""


class Batches:
    """What the trainer's loader is to an update, from memory: ``BATCHES`` micro-batches over and over.

    Images are uniform bytes, labels uniform, augmentation that is left to the device drawn as for a run's first positions.
    """

    wait_s = 0.0

    def __init__(self, config: Config, device: torch.device) -> None:
        task, count = create_task(config), config.train.samples_a_pass
        self._batches: list[Batch] = [
            task.example(count, config.model.img_size, device, first=number * count)
            for number in range(BATCHES)
        ]
        self._next = 0

    def __next__(self) -> Batch:
        """Give the next micro-batch, on the device."""
        self._next += 1
        return self._batches[(self._next - 1) % BATCHES]


class Contender:
    """A session and its batches; calling it runs one update as the trainer does."""

    def __init__(self, session: Session, batches: Batches, lr: float) -> None:
        self.session, self.batches, self.lr = session, batches, lr
        self.skipped = 0
        """Updates that were not applied."""
        self.facts: dict[str, float | str | None] = {}
        """More columns of the report."""

    def __call__(self) -> Any:
        """Run one update; returns what the trainer gets of it."""
        update = self.session.train_step(self.batches, self.lr)
        if not update.applied:
            self.skipped += 1
        elif self.session.ema is not None:
            self.session.ema.update()
        return update

    def close(self) -> None:
        """End the engine."""
        self.session.close()


def open_contender(name: str, config: Config, device: torch.device, notes: list[str]) -> Contender | None:
    """Open a contender and run its first updates, after which its memory and first loss are known.

    Returns None, with a line in ``notes``, where the device's memory does not suffice, or its setting is not one for the recipe.

    Raises:
        ConfigError: the recipe's own settings do not go together.
        UserError: it does not suffice for the recipe itself, or no update of it is finite.
    """
    derived = derive(config, world=1, samples_per_epoch=max(1_281_167, config.train.global_batch))
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    begin = time.perf_counter()
    contender = None
    try:
        with captured_warnings(compiling.log) as lines:
            contender = Contender(
                open_session(config, derived, device, config.model.img_size),
                Batches(config, device),
                config.optim.lr,
            )
            update = contender()
            started, first = time.perf_counter() - begin, update.loss_sum / max(update.weight, 1.0)
            for _ in range(SETTLE):
                if update.applied:
                    break
                update = contender()
            contender.facts = {"first loss": f"{first:.4f}", "first update s": round(started, 1)}
            contender.facts |= memory(contender, before, device)
    except ConfigError as error:
        if name == BASELINE:
            raise
        notes.append(f"{name}: left out: {error}")
        return None
    except torch.OutOfMemoryError as error:
        if contender is not None:
            contender.close()
        if name == BASELINE:
            raise UserError(
                f"train.micro_batch={config.train.micro_batch} does not fit on {device}: {str(error).splitlines()[0]}"
            ) from None
        notes.append(f"{name}: out of memory, left out.")
        torch.cuda.empty_cache()
        return None
    notes += [f"{name}: {line}" for line in lines]
    if not update.applied:
        raise UserError(f"{name}: none of the first {SETTLE} updates was finite; there is nothing to measure")
    contender.skipped = 0
    return contender


@contextmanager
def captured_warnings(logger: logging.Logger) -> Iterator[list[str]]:
    """The warnings of ``logger`` inside the block, which then need no console."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            """Keep the message."""
            lines.append(record.getMessage())

    handler = Handler(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


# Memory ------------------------------------------------------------------------------------------------------------


def memory(contender: Contender, before: int, device: torch.device) -> dict[str, float | str | None]:
    """Memory of one more update, as columns of the report.

    On CUDA: GB at its peak, and what of them stands between updates (``before`` bytes were there without the contender).
    Elsewhere: MB that autograd keeps of a micro-batch between forward and backward, weights left out.
    """
    images = contender.session.engine.train_micro_batch_size_per_gpu()
    if device.type != "cuda":
        return {"MB kept/image": kept_bytes(contender) / images / 1e6}
    torch.cuda.reset_peak_memory_stats(device)
    contender()
    torch.cuda.synchronize(device)
    standing = torch.cuda.memory_allocated(device) - before
    peak = torch.cuda.max_memory_allocated(device) - before
    return {"GB peak": peak / 1e9, "GB between updates": standing / 1e9}


def kept_bytes(contender: Contender) -> int:
    """Bytes of the storages that autograd keeps for backward, each counted once, in one more update; weights left out."""
    module = contender.session.engine.module
    train_step = contender.session.train_step
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        # Asked anew each time: under stage 3 weights have other storages in every forward pass.
        if all(storage.data_ptr() != own.untyped_storage().data_ptr() for own in module.parameters()):
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    def forward(batch: Batch) -> Any:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            return plain(batch)

    plain = train_step.forward
    with replaced(train_step, forward=forward):
        contender()
    return sum(kept.values())
