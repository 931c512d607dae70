"""The local supervisor with real processes: a rank that dies takes the others along, and the rules of restarts hold.

The snapshot's trainer is replaced by a few lines that step and publish checkpoints, so that a test takes seconds; training
through the same road is in ``tests/slurm``.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dattrain.config.load import loads
from dattrain.submit import history, local, run_status, submission
from dattrain.submit.cluster import Profile
from dattrain.submit.plan import Stage

TRAIN = """
import os, signal, time
from collections import namedtuple
from pathlib import Path

Outcome = namedtuple("Outcome", "status step")


def train(config, run, env=None, on_evaluation=None):
    rank = int(os.environ["SUBMITIT_LOCAL_GLOBALID"])
    signalled = []
    signal.signal(signal.SIGUSR2, lambda *_: signalled.append(1))
    step = max((int(p.name[5:]) for p in run.glob("checkpoints/step_*")), default=0)
    (run / f"pid_{rank}").write_text(str(os.getpid()))
    while step < 40:
        time.sleep(0.05)
        step += 1
        if rank == 0:
            (run / "step").write_text(str(step))
        if rank == 0 and (step == 40 or signalled or (step % 10 == 0 and not (run / "no-saves").exists())):
            (run / f"checkpoints/step_{step:08d}").mkdir(parents=True)
            (run / f"checkpoints/step_{step:08d}/manifest.json").write_text("{}")
        if signalled:
            return Outcome("preempted", step)
        if (run / "raise").exists():
            raise ValueError("out of luck")
    return Outcome("finished", step)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Start a run of two tasks; whatever is left of it is ended afterwards."""
    runs = []

    def begin(**settings: Any) -> Path:
        run = tmp_path / "run"
        profile = Profile(kind="local", tasks_per_node=2, time="10", environment={"OMP_NUM_THREADS": "1"})
        stage = Stage("t", (run,), (loads("name: t\n"),), profile, "local", (1, 1), 10, **settings)
        submission.prepare(stage)
        (run / "submit" / "code" / "dattrain" / "engine" / "train.py").write_text(TRAIN)
        submission.submit_stage(stage)
        runs.append(run)
        return run

    yield begin
    for run in runs:
        local.cancel(run)
        _until(lambda run=run: not local.alive(run))


def _until(done: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := done():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def _step(run: Path) -> int:
    return int((run / "step").read_text() or 0) if (run / "step").is_file() else 0


def _pids(run: Path) -> list[int]:
    """Both tasks, once they have begun to train."""
    files = [run / f"pid_{rank}" for rank in (0, 1)]
    _until(lambda: all(path.is_file() and path.read_text() for path in files))
    return [int(path.read_text()) for path in files]


def _ends(run: Path) -> list[history.Event]:
    return [e for e in history.history(run) if e["event"] == "end"]


def test_a_killed_rank_takes_the_other_along_and_the_run_resumes(start: Callable[..., Path]) -> None:
    run = start()
    _until(lambda: _step(run) > 12)
    os.kill(_pids(run)[1], signal.SIGKILL)
    # submitit's controller alone would have let the first rank go on, and called the job finished.
    _until(lambda: not local.alive(run))
    first, last = _ends(run)
    assert (first["reason"], first["action"]) == ("crashed", "again")
    assert (last["reason"], last["checkpoint"]) == ("finished", 40)
    begins = [e["checkpoint"] for e in history.history(run) if e["event"] == "begin"]
    assert begins[0] is None
    assert begins[1] >= 10


def test_an_error_before_any_checkpoint_ends_the_run_with_its_words(
    start: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "run" / "submit").mkdir(parents=True)
    (tmp_path / "run" / "raise").touch()
    run = start()
    _until(lambda: not local.alive(run))
    (end,) = _ends(run)
    assert (end["reason"], end["action"]) == ("crashed", "stop")
    assert "ValueError: out of luck" in end["why"]


def test_a_signal_to_the_tasks_saves_and_resumes(start: Callable[..., Path]) -> None:
    run = start()
    assert local.alive(run)
    assert run_status.active_job(run)[1] == "RUNNING"
    _until(lambda: _step(run) > 3)
    for pid in _pids(run):
        os.kill(pid, signal.SIGUSR2)
    _until(lambda: not local.alive(run))
    first, last = _ends(run)
    assert (first["reason"], first["action"]) == ("preempted", "again")
    assert (last["reason"], last["action"], last["checkpoint"]) == ("finished", "done", 40)
    assert run_status.active_job(run) == (None, "")


def test_cancel_ends_supervisor_and_tasks(start: Callable[..., Path]) -> None:
    run = start()
    pids = _pids(run)
    history.record(run, "cancel")
    assert local.cancel(run)
    _until(lambda: not local.alive(run))
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert _ends(run)[-1]["action"] == "stop"
    assert not local.cancel(run)
    assert json.loads((run / "submit" / "local.json").read_text())["pid"] > 0
