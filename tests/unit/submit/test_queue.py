"""States from squeue, sacct and scontrol: real output of each, and which of them is believed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dattrain.submit import queue
from dattrain.submit.queue import JobState

SCONTROL = (
    "JobId=12 JobName=demo UserId=root(0) Priority=4294901748 JobState=NODE_FAIL Reason=NodeDown Dependency=(null) "
    "Requeue=1 Restarts=0 ReqNodeList=(null) ExcNodeList=(null) NodeList=n[1-2] BatchHost=n1 NumNodes=2"
)


def _program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only Slurm commands that are there are those that a test puts here."""
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), "/usr/bin", "/bin"]))
    for name in ("squeue", "sacct", "scontrol"):
        _program(tmp_path, name, "exit 1")
    return tmp_path


def test_squeue_with_pending_and_arrays() -> None:
    found = queue.parse_squeue("7_1|PENDING|Dependency|\n7_0|RUNNING|None|n[1-2]\n")
    assert found["7_0"] == JobState("RUNNING", "", "n[1-2]", "squeue")
    assert found["7_1"].reason == "Dependency"


def test_sacct_with_arrays_and_a_canceller() -> None:
    found = queue.parse_sacct("7_[2-3%1]|PENDING|None assigned\n8|CANCELLED by 0|n1\n")
    assert found["7_2"].state == found["7_3"].state == "PENDING"
    assert found["8"] == JobState("CANCELLED", "", "n1", "sacct")


def test_scontrol_is_asked_when_the_others_do_not_know(bin_folder: Path) -> None:
    _program(bin_folder, "scontrol", f'echo "{SCONTROL}"')
    state = queue.states(["12"])["12"]
    assert state == JobState("NODE_FAIL", "NodeDown", "n[1-2]", "scontrol")
    assert not state.final


def test_a_live_word_from_squeue_beats_what_sacct_says_of_an_attempt(bin_folder: Path) -> None:
    _program(bin_folder, "squeue", 'echo "12|PENDING|BeginTime|"')
    _program(bin_folder, "sacct", 'echo "12|NODE_FAIL|n1"')
    assert queue.states(["12"])["12"].state == "PENDING"


def test_sacct_is_believed_once_squeue_has_forgotten(bin_folder: Path) -> None:
    _program(bin_folder, "sacct", 'echo "12|COMPLETED|n1"; echo "13|FAILED|n1"')
    found = queue.states(["12", "13", "14"])
    assert (found["12"].state, found["13"].state, found["14"].state) == ("COMPLETED", "FAILED", "UNKNOWN")


def test_without_slurm_everything_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert queue.states(["1"])["1"] == queue.UNKNOWN
    assert queue.refusal("#!/bin/bash", None, 5) is not None


def test_an_unknown_partition_lists_the_known(bin_folder: Path) -> None:
    _program(bin_folder, "sbatch", "echo 'sbatch: error: invalid partition specified: gpuu' >&2; exit 1")
    _program(bin_folder, "sinfo", "echo 'main*'; echo gpu")
    assert queue.refusal("x", "gpuu", 5) == "partition 'gpuu' does not exist here; there are: gpu, main"


def test_a_time_that_the_partition_does_not_allow(bin_folder: Path) -> None:
    _program(bin_folder, "sbatch", "exit 0")
    _program(bin_folder, "sinfo", "echo 'main*|1:00:00'; echo 'gpu|infinite'")
    assert queue.refusal("x", None, 60) is None
    assert queue.refusal("x", "gpu", 6000) is None
    assert "allows 1:00:00" in str(queue.refusal("x", None, 61))
