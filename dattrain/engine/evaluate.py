"""The evaluations of a run: the task's metrics over ``data.val``, of the weights and of their averages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dattrain.config.derive import check_early_stopping
from dattrain.config.schema import Config
from dattrain.data.classes import Classes
from dattrain.data.to_device import to_device
from dattrain.engine import precision
from dattrain.engine.session import Session
from dattrain.errors import ConfigError
from dattrain.runtime import collectives
from dattrain.tasks.base import EvalLoader, Size, Task

T = TypeVar("T")


def check_metric(config: Config, task: Task) -> None:
    """Refuse a ``checkpoint.metric`` that no evaluation has: no checkpoint would be kept as the best, in silence.

    Raises:
        ConfigError: that, or early stopping that has nothing to look at (``config.derive.check_early_stopping``).
    """
    wanted, known = config.checkpoint.metric, task.metrics
    names = [*known, *(f"ema_{name}" for name in known)]
    if wanted not in names:
        raise ConfigError(
            f"checkpoint.metric={wanted} is no number of the evaluation; it has {', '.join(names)}"
        )
    check_early_stopping(config)


class Interrupted(Exception):
    """All ranks agreed to stop the evaluation."""


class AllRanks:
    """The exchanges between the ranks of the default process group; see ``dattrain.tasks.base.Ranks``.

    Args:
        waiting: called now and then while rank 0 is waited for.
    """

    def __init__(self, waiting: Callable[[], object] = lambda: None) -> None:
        self._waiting = waiting

    def sum(self, values: Tensor) -> None:
        """Replace ``values`` by their sum over ranks. Collective."""
        dist.all_reduce(values)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, by rank. Collective."""
        return collectives.all_gather(value)

    def gather_to_first(self, value: Any) -> list[Any] | None:
        """Every rank's ``value``, by rank, on rank 0; None on the others. Collective."""
        return collectives.gather_to_first(value)

    def on_first(self, function: Callable[[], T]) -> T:
        """What ``function`` gives on rank 0, without a collective that could time out. Raises as ``collectives.on_first``."""
        return collectives.on_first(function, self._waiting)


@torch.no_grad()
def evaluate(
    engine: Any,
    loader: EvalLoader[Any],
    task: Task,
    config: Config,
    device: torch.device,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    beat: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, float], Mapping[str, Any]]:
    """Evaluate ``engine`` (its current weights): the task's metrics, and its predictions for a report. Collective.

    Args:
        should_stop: asked before each batch; if it says yes on one rank, all stop together.
        beat: called after each batch with how many are done, of how many.

    Raises:
        Interrupted: ``should_stop`` was true somewhere.
    """
    engine.eval()
    evaluator = task.evaluator(device, precision.WEIGHTS[config.train.precision])
    try:
        for done, batch in enumerate(loader, 1):
            asked = to_device(torch.tensor(float(should_stop())), device)
            dist.all_reduce(asked)
            if asked.item() > 0:
                raise Interrupted
            evaluator.update(engine, batch, lockstep=config.zero.stage == 3)
            beat(done, len(loader))
    finally:
        engine.train()
    # Also while rank 0 computes: a rank that waits is not silent.
    ranks = AllRanks(lambda: beat(len(loader), len(loader)))
    return evaluator.compute(ranks), evaluator.predictions(ranks)


class Evaluations:
    """The evaluation set of a run, opened at the current image size, and the result of the last evaluation.

    Attributes:
        step: the update after which the last evaluation was, -1 before there is one.
        metrics: its result.
        predictions: what a report shows of it; of the averaged weights where they were evaluated.
    """

    def __init__(
        self, task: Task, config: Config, classes: Classes, *, rank: int, world: int, device: torch.device
    ) -> None:
        self.task, self.config, self.device = task, config, device
        self.step = -1
        self.metrics: dict[str, float] = {}
        self.predictions: Mapping[str, Any] = {}
        self._classes, self._rank, self._world = classes, rank, world
        self._open: tuple[Size, EvalLoader[Any]] | None = None

    def loader(self, img_size: Size) -> EvalLoader[Any]:
        """The evaluation set at ``img_size``; raises as ``Task.eval_loader``."""
        if self._open is None or self._open[0] != img_size:
            self.close()
            loader = self.task.eval_loader(
                self._classes, rank=self._rank, world=self._world, device=self.device, img_size=img_size
            )
            self._open = (img_size, loader)
        return self._open[1]

    def run(
        self,
        session: Session,
        step: int,
        *,
        should_stop: Callable[[], bool],
        beat: Callable[[str, int, int], None],
        settle: Callable[[], None],
    ) -> dict[str, float]:
        """Evaluate the weights, and under ``eval.ema`` their averages (``ema_`` before each name). Collective.

        Args:
            should_stop: as for ``evaluate``.
            beat: called after each batch with whose weights are evaluated (nothing, or words that follow "evaluating"), how many
                batches are done, of how many.
            settle: waits for a background save, before the weights are exchanged for their averages.

        Raises:
            Interrupted: ``should_stop`` was true somewhere.
        """

        def once(what: str) -> tuple[dict[str, float], Mapping[str, Any]]:
            return evaluate(
                session.engine, self.loader(session.img_size), self.task, self.config, self.device,
                should_stop=should_stop, beat=partial(beat, what),
            )  # fmt: skip

        session.train_step.statistics.average()
        metrics, predictions = once("")
        if session.ema is not None and self.config.eval.ema:
            settle()  # a skipped update has not waited for the save before it
            with session.ema.applied():
                averaged, predictions = once(" the averages")
            metrics |= {f"ema_{name}": value for name, value in averaged.items()}
        self.step, self.metrics, self.predictions = step, metrics, predictions
        return metrics

    def close(self) -> None:
        """End the loader's workers. Not collective."""
        if self._open is not None:
            self._open[1].close()
            self._open = None
