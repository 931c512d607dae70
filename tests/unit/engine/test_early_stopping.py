"""When the evaluations so far say that a run is done."""

from __future__ import annotations

import pytest

from dattrain.config.derive import check_early_stopping
from dattrain.config.load import loads
from dattrain.engine.early_stopping import WAITED, EarlyStopping, stopped_early
from dattrain.errors import ConfigError


def _config(metric: str = "top1", delta: float = 0.0, more: str = "data: {val: v}"):
    return loads(
        f"train: {{early_stopping_patience: 2, early_stopping_min_delta: {delta}}}\ncheckpoint: {{metric: {metric}}}\n{more}\n"
    ).config


def _rows(key: str, values):
    return [{"step": n, "eval_images": 9, key: value} for n, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("metric", "delta", "values", "waited", "best_step"),
    [
        ("top1", 0.0, [50.0, 51.0, 51.0], 1, 2),
        ("top1", 0.5, [50.0, 50.4, 50.6], 0, 3),  # against the last improvement, not the evaluation before
        ("top1", 0.5, [50.0, 50.4, 50.5], 2, 1),
        ("loss", 0.0, [2.0, 1.0, 1.5], 1, 2),
        ("top1", 0.0, [None, None], 2, 0),  # not finite: null in the file
        ("top1", 0.0, [], 0, 0),
    ],
)
def test_an_improvement_is_more_than_the_best_by_more_than_min_delta(
    metric, delta, values, waited, best_step
):
    key = "eval_loss" if metric == "loss" else metric
    rows = _rows(key, values)
    rows.insert(1, {"step": 1, "loss": 0.0})  # an update's row is no evaluation
    found = EarlyStopping(_config(metric, delta), rows)
    assert (found.waited, found.best_step, found.reached) == (waited, best_step, waited >= 2)
    live = EarlyStopping(_config(metric, delta), [])
    for step, value in enumerate(values, 1):
        live.add(step, float("nan") if value is None else value)
    assert (live.waited, live.best, live.reached) == (found.waited, found.best, found.reached)


def test_a_run_that_goes_on_with_more_patience_is_not_called_stopped():
    assert "top1 has not improved for 2 evaluations" in (stopped_early(_config(), {WAITED: 2}) or "")
    assert stopped_early(_config(), {WAITED: 1}) is None
    assert stopped_early(loads("name: x\n").config, {WAITED: 5}) is None


def test_it_needs_the_evaluations_that_it_looks_at():
    check_early_stopping(_config())
    with pytest.raises(ConfigError, match="data.val is not set"):
        check_early_stopping(_config(more=""))
    with pytest.raises(ConfigError, match="checkpoint.metric=ema_top1, but no averages are evaluated"):
        check_early_stopping(_config("ema_top1"))
