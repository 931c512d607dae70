"""``engine.train.train`` with the run's page: written at every evaluation, and once more at the end with sampling points and a picture.

That a page cannot be written is said, and ends no training.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dattrain.config.schema import Config
from dattrain.engine import train as training
from dattrain.errors import UserError
from dattrain.observe import events, metrics
from dattrain.report import page
from dattrain.runtime import environment
from dattrain.runtime.environment import Env

if TYPE_CHECKING:
    from dattrain.engine.trainer import Outcome

Jobs = Callable[[Path], Sequence[Mapping[str, Any]]]
"""A run folder to the history of its jobs (``submit.history.history``)."""

_CHEAP_S, _SHARE = 1.0, 0.01
"""A page that takes longer than ``_CHEAP_S`` (of hundreds of thousands of updates) is left out where it would take a larger share
of the time since the last."""

log = logging.getLogger(__name__)


def train(config: Config, run_dir: Path, jobs: Jobs, *, env: Env | None = None) -> Outcome:
    """Train, and keep ``RUN/report.html`` up to date; as ``engine.train.train``, whose arguments and errors these are."""
    env = env or environment.resolve(os.environ)
    first = env.rank == 0
    live = LivePage(jobs)
    try:
        outcome = training.train(config, run_dir, env=env, on_evaluation=live)
    except Exception:
        # One that had not begun, as where another process has the folder, has nothing to add.
        if first and events.read(run_dir)[-1:] and events.read(run_dir)[-1].get("status") == "failed":
            _write(run_dir, jobs)
        raise
    if first:
        if outcome.status == "preempted":
            _write(run_dir, jobs)  # there is no time for more
        else:
            finish(run_dir, jobs, env)
    return outcome


class LivePage:
    """Writes the page of a run that is being trained."""

    def __init__(self, jobs: Jobs, clock: Callable[[], float] = time.monotonic) -> None:
        self._jobs, self._clock = jobs, clock
        self._took = 0.0
        self._written: float | None = None

    def __call__(self, run_dir: Path) -> None:
        """Write it, where that is cheap."""
        begin = self._clock()
        if self._written is None:
            log.info("report: %s, written anew at every evaluation", run_dir / page.FILE)
        elif self._took > _CHEAP_S and begin - self._written < self._took / _SHARE:
            return
        _write(run_dir, self._jobs, alive=True)
        self._written = self._clock()
        self._took = self._written - begin


def finish(run_dir: Path, jobs: Jobs, env: Env) -> None:
    """The page with sampling points where there are images, and ``results.png`` where there are numbers."""
    if (run_dir / events.PREDICTIONS).is_file():
        _attempt(run_dir / events.PREDICTIONS, lambda: _add_points(run_dir, env))
    _write(run_dir, jobs)
    if (run_dir / metrics.FILE).is_file():
        from dattrain.report import chart

        _attempt(run_dir / chart.FILE, lambda: chart.write(run_dir / chart.FILE, [run_dir]))


def _add_points(run_dir: Path, env: Env) -> None:
    found: dict[str, Any] = json.loads((run_dir / events.PREDICTIONS).read_text(encoding="utf-8"))
    if "points_of" not in found:
        from dattrain.report import pictures

        pictures.with_points(run_dir, found, environment.pick_device(env))


def _write(run_dir: Path, jobs: Jobs, *, alive: bool = False) -> None:
    path = run_dir / page.FILE
    _attempt(path, lambda: page.write(path, [page.collect(run_dir, jobs(run_dir), alive=alive)]))


def _attempt(path: Path, action: Callable[[], None]) -> None:
    try:
        action()
    except (UserError, OSError) as error:
        log.warning("%s: not written: %s", path, error)
    except Exception:
        log.exception("%s: not written", path)
