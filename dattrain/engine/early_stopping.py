"""Early stopping: whether the evaluations so far say that a run is done. Pure of torch; ``dattrain status`` asks too.

The state is what the rows of ``metrics.jsonl`` say, so a resumed run stops where an undisturbed one does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from dattrain.config.schema import Config
from dattrain.observe.metrics import Row, key_of
from dattrain.state.format.retention import lower_is_better

WAITED = "evaluations_without_improvement"
"""Key of an evaluation's row; there where ``train.early_stopping_patience`` is set."""


class EarlyStopping:
    """Counts the evaluations since ``checkpoint.metric`` was last better than ever by more than ``early_stopping_min_delta``.

    Args:
        config: the recipe.
        rows: of ``metrics.jsonl``, up to the step that training resumes from.

    Attributes:
        best: the best value yet that counted as an improvement, None before the first.
        best_step: the update after which it was measured.
        waited: evaluations since then.
    """

    def __init__(self, config: Config, rows: Iterable[Row]) -> None:
        self.patience = config.train.early_stopping_patience
        self.metric = config.checkpoint.metric
        self._min_delta = config.train.early_stopping_min_delta
        self.best: float | None = None
        self.best_step = self.waited = 0
        key = key_of(self.metric)
        for row in rows:
            if "eval_images" in row:
                self.add(row["step"], row.get(key))

    def add(self, step: int, value: float | None) -> None:
        """Count one evaluation; a value that is None or not finite is no improvement."""
        finite = value is not None and math.isfinite(value)
        if finite and (self.best is None or self._gain(value, self.best) > self._min_delta):
            self.best, self.best_step, self.waited = value, step, 0
        else:
            self.waited += 1

    @property
    def reached(self) -> bool:
        """Whether the run is done."""
        return self.patience is not None and self.waited >= self.patience

    def reason(self) -> str:
        """One line on why it is."""
        return reason(self.metric, self.waited) + (
            "" if self.best is None else f"; the best was {self.best:g}"
        )

    def _gain(self, value: Any, best: float) -> float:
        return float(best - value if lower_is_better(self.metric) else value - best)


def reason(metric: str, waited: int) -> str:
    """Why a run was stopped early."""
    times = "evaluation" if waited == 1 else "evaluations"
    return f"stopped early: {metric} has not improved for {waited} {times} (train.early_stopping_patience)"


def stopped_early(config: Config, metrics: Mapping[str, Any]) -> str | None:
    """Why a run that is over ended before its last update, by its newest metrics; None where early stopping is not the reason."""
    patience, waited = config.train.early_stopping_patience, metrics.get(WAITED)
    return reason(config.checkpoint.metric, waited) if patience and waited and waited >= patience else None
