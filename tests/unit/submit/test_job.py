"""The callable of a task: what it pickles, what word it leaves behind."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from dattrain.submit.job import Job, attempt


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM", "SUBMITIT")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURMD_NODENAME", "n2")


def test_it_is_small_and_survives_pickling() -> None:
    data = pickle.dumps(Job("/r", "evaluate"))
    assert pickle.loads(data) == Job("/r", "evaluate")
    assert len(data) < 500


@pytest.mark.usefixtures("slurm")
def test_attempts_are_told_apart_by_job_and_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attempt() == ("7", 2)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "6")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert attempt() == ("6_3", 2)


@pytest.mark.usefixtures("slurm")
def test_a_failing_rank_says_where_and_why(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {train: nowhere}\n")
    with pytest.raises(Exception, match="init.from"):
        Job(str(tmp_path), "evaluate")()
    report = json.loads((tmp_path / "submit" / "attempts" / "7.2" / "rank_00001.json").read_text())
    assert (report["rank"], report["node"], report["user_error"]) == (1, "n2", True)
    assert "an evaluation needs init.from" in report["error"]


@pytest.mark.usefixtures("slurm")
def test_a_signal_before_training_leaves_word_and_does_not_let_submitit_requeue(tmp_path: Path) -> None:
    assert Job(str(tmp_path)).checkpoint() is None
    outcome = json.loads((tmp_path / "submit" / "attempts" / "7.2" / "outcome.json").read_text())
    assert (outcome["status"], outcome["step"]) == ("preempted", None)


def test_nothing_heavy_is_imported_before_the_task_begins() -> None:
    code = "import sys, dattrain.submit.job; print([m for m in ('torch', 'pydantic', 'submitit') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
