"""The local supervisor with real processes: a rank that dies takes the others along, the rules of restarts hold, runs take turns.

The snapshot's trainer is replaced by a few lines that step and publish checkpoints, so that a test takes seconds; training
through the same road is in ``tests/slurm``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dattrain.cli import cancel as cancel_verb
from dattrain.config.load import loads
from dattrain.errors import UserError
from dattrain.submit import history, local, local_turns, run_status, submission
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


PROFILE = Profile(kind="local", tasks_per_node=1, time="10", environment={"OMP_NUM_THREADS": "1"})


@pytest.fixture
def turns(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start runs a, b, c in one supervisor, each behind the one before (a chain) or not; end what is left afterwards."""
    started = []

    def begin(*, chain: bool, names: str = "abc") -> Any:
        runs = [tmp_path / name for name in names]
        for number, run in enumerate(runs):
            stage = Stage(run.name, (run,), (loads("name: t\n"),), PROFILE, "local", (1, 1), 10)
            submission.prepare(stage, runs[number + 1 : number + 2] if chain else ())
        (runs[0] / "submit" / "code" / "dattrain" / "engine" / "train.py").write_text(TRAIN)
        started.append(local.start(runs, PROFILE))
        return started[-1], runs

    yield begin
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.wait(60)


def _states(runs: list[Path]) -> list[str]:
    return [run_status.status_of(run, {}, local_alive=local.alive(run)).state for run in runs]


def test_the_runs_of_a_chain_take_turns_and_one_that_fails_keeps_those_behind_it_from_starting(
    turns: Callable[..., Any],
) -> None:
    said: list[str] = []
    states: list[list[str]] = []
    process, runs = turns(chain=True)
    (runs[1] / "raise").touch()
    _until(lambda: _step(runs[0]) > 3)
    states.append(_states(runs))
    assert run_status.active_job(runs[2]) == (f"local-{process.pid}", "RUNNING")
    with pytest.raises(
        UserError, match="b has not ended well: .*out of luck; not finished either: c.*with: the same"
    ):
        local_turns.follow(process, runs, again="the same", say=said.append)
    states.append(_states(runs))
    assert states == [["running", "waiting", "waiting"], ["finished", "failed", "cancelled"]]
    assert said[:2] == ["a: finished at step 40", "b: begins"]
    assert said[-1] == "c: b did not end well"
    assert not [event for event in history.history(runs[2]) if event["event"] == "begin"]
    assert "crashed: " in (runs[1] / "submit" / "local.log").read_text()


def test_the_runs_of_an_array_do_not_wait_for_success_and_one_may_be_cancelled(
    turns: Callable[..., Any],
) -> None:
    process, runs = turns(chain=False)
    (runs[0] / "raise").touch()
    _until(lambda: _step(runs[1]) > 3)
    arguments = argparse.Namespace(runs=[str(runs[1])])
    assert cancel_verb.run(arguments) == 0
    with pytest.raises(UserError, match="a has not ended well: .*; not finished either: b"):
        local_turns.follow(process, runs, again="")
    assert _states(runs) == ["failed", "cancelled", "finished"]


def test_a_run_that_is_cancelled_before_its_turn_never_starts(turns: Callable[..., Any]) -> None:
    process, runs = turns(chain=False, names="ab")
    _until(lambda: (runs[0] / "pid_0").is_file())
    assert cancel_verb.run(argparse.Namespace(runs=[str(runs[1])])) == 0
    with pytest.raises(UserError, match="b has not ended well: cancelled"):
        local_turns.follow(process, runs, again="")
    assert _states(runs) == ["finished", "cancelled"]


def test_ctrl_c_ends_what_runs_and_starts_nothing_else_and_the_same_again_goes_on(
    turns: Callable[..., Any],
) -> None:
    said: list[str] = []
    process, runs = turns(chain=True, names="ab")
    _until(lambda: _step(runs[0]) > 12)
    pid = int((runs[0] / "pid_0").read_text())
    # What a shell starts in the background ignores Ctrl-C, these tests too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        assert local_turns.follow(process, runs, again="dattrain submit chain", say=said.append) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert said[-1].endswith("goes on with: dattrain submit chain")
    assert not Path(f"/proc/{pid}").exists() and _states(runs) == ["cancelled", "cancelled"]
    process, runs = turns(chain=True, names="ab")
    assert local_turns.follow(process, runs, again="") == 0
    assert [e["checkpoint"] for e in history.history(runs[0]) if e["event"] == "begin"][-1] >= 10
    assert _states(runs) == ["finished", "finished"]
