"""A copied or moved run folder has no jobs, whatever its history remembers; and one folder is submitted once at a time."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dattrain.cli import cancel
from dattrain.cli.main import main
from dattrain.errors import UserError
from dattrain.runtime import owner
from dattrain.submit import dependency, history, local, queue, run_status, submission
from dattrain.submit.plan import SubmitRequest

RECIPE = "name: demo\ntrain: {global_batch: 64, micro_batch: 8}\ndata: {train: shards}\n"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Slurm where job 12 runs, and the next one is 13."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in {
        "squeue": 'case "$*" in *12*) echo "12|RUNNING|None|n1";; esac',
        "sbatch": 'case "$*" in *--test-only*) ;; *) echo "Submitted batch job 13"; sleep 0.3;; esac',
        "scancel": "",
        "sinfo": "",
    }.items():
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $@" >> {tmp_path}/calls\n{script}\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("tasks_per_node: 2\npython: /env/python\nsignal_delay_s: 60\n")
    return tmp_path


def calls(home: Path) -> list[str]:
    path = home / "calls"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def run(cluster: Path) -> Path:
    """A run whose job 12 trains."""
    folder = cluster / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(RECIPE)
    history.record(folder, "submit", job="12", by="user")
    (folder / "submit" / "spec.json").write_text(json.dumps({"folder": str(folder / "submit" / "slurm")}))
    history.record(folder, "begin", job="12", restart=0, nodes=["n1"], checkpoint=None)
    return folder


def forget_where(folder: Path) -> None:
    """The history as it was written before it said where a submission was made."""
    path = folder / "submit" / "history.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in e.items() if k != "run"}) + "\n" for e in events))


def copied(run: Path) -> Path:
    return Path(shutil.copytree(run, run.with_name("copy")))


def moved(run: Path) -> Path:
    return run.rename(run.with_name("moved"))


@pytest.mark.parametrize("old", [False, True], ids=["", "old"])
@pytest.mark.parametrize(("become", "word"), [(copied, "a copy of"), (moved, "moved from")])
def test_it_has_no_jobs(
    cluster: Path, run: Path, become: Callable[[Path], Path], word: str, old: bool, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    if old:
        forget_where(run)
    assert run_status.active_job(run) == ("12", "RUNNING")
    other = become(run)
    assert main(["cancel", str(other)]) == 0
    assert f"no job to cancel ({word} {run}: " in capsys.readouterr().out
    assert "scancel" not in calls(cluster)
    one = run_status.status_of(other, queue.states(run_status.jobs_of(other)))
    assert (one.state, one.job) == ("not submitted", None)
    assert one.why == f"{word} {run}: the jobs submitted there are not this folder's"
    with pytest.raises(UserError, match="neither a job id nor a run folder that was submitted"):
        dependency.dependency_on(str(other))
    # It is submitted like any other, begins its own history, and its jobs are then its own.
    assert submission.submit(SubmitRequest(str(other), cluster="./c.yaml")) == 0
    spec = history.read_spec(other)
    assert spec["folder"] == str(other / "submit" / "slurm") and spec["dependents"] == []
    assert [e["event"] for e in history.history(other)] == ["submit"]
    assert history.open_attempt(history.history(other)) is None
    assert history.origin(other) is None
    assert run_status.jobs_of(other) == ["13"]
    assert run_status.active_job(other)[0] is None  # not what job 12 does
    if become is copied:
        assert run_status.active_job(run) == ("12", "RUNNING")


def test_a_link_to_a_run_is_the_run(cluster: Path, run: Path) -> None:
    new = moved(run)
    run.symlink_to(new)
    assert run_status.active_job(run) == run_status.active_job(new) == ("12", "RUNNING")
    assert history.origin(new) is None


def test_the_supervisor_of_a_copied_run_is_not_its_own(cluster: Path, run: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        known = {"pid": other.pid, "start": local.start_time(other.pid), "host": os.uname().nodename}
        history.record(run, "submit", job=f"local-{other.pid}", by="user")
        (run / "submit" / "local.json").write_text(json.dumps(known))
        copy = copied(run)
        assert local.alive(run) and not local.alive(copy)
        assert not local.cancel(copy)
        (run / "submit" / "local.json").write_text(json.dumps({**known, "start": "1"}))
        assert not local.cancel(run)  # its number has gone to another process
        assert other.poll() is None
        other.communicate(b"\n")


def test_of_two_submissions_at_once_one_is_refused(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cluster / "r.yaml").write_text(RECIPE)
    said: list[str] = []
    both = threading.Barrier(2)
    reserved = submission.reserved

    def checked(stages: object) -> object:
        both.wait()  # both have found the folder free
        return reserved(stages)  # type: ignore[arg-type]

    def submit() -> None:
        try:
            submission.submit(SubmitRequest("r.yaml", cluster="./c.yaml", folder=str(cluster / "new")))
        except UserError as error:
            said.append(str(error))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(submission, "reserved", checked)
        threads = [threading.Thread(target=submit) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(said) == 1 and "is being submitted by process" in said[0]
    assert [e["job"] for e in history.history(cluster / "new")] == ["13"]
    assert not (cluster / "new" / "submit" / "owner.json").exists()


def test_a_run_that_is_trained_by_hand_is_not_submitted_and_status_says_who_trains_it(
    cluster: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copied(run)
    with owner.acquire(copy):
        with pytest.raises(UserError, match=f"is being trained by process {os.getpid()} on "):
            submission.submit(SubmitRequest(str(copy), cluster="./c.yaml"))
        one = run_status.status_of(copy, {})
        assert one.state == "running" and one.why.startswith(f"trained by process {os.getpid()} on ")
        main(["cancel", str(copy)])
        assert f"trained by process {os.getpid()} on " in capsys.readouterr().out
    assert "sbatch" not in calls(cluster)
    assert run_status.status_of(copy, {}).state == "not submitted"


def test_cancel_of_a_run_that_slurm_does_not_answer_for_says_so(cluster: Path, run: Path) -> None:
    (cluster / "bin" / "squeue").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(UserError, match="Slurm does not answer, so nothing is cancelled"):
        cancel.run(argparse.Namespace(runs=[str(run)]))
    assert not history.cancelled(history.history(run))
    history.record(run, "end", job="12", reason="finished", action="done")
    assert cancel.run(argparse.Namespace(runs=[str(run)])) == 0


def test_what_the_history_has_decided_is_not_asked_of_slurm(cluster: Path, run: Path) -> None:
    assert run_status.jobs_of(run) == ["12"]
    history.record(run, "end", job="12", reason="finished", action="done")
    assert run_status.jobs_of(run) == []
