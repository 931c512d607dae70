"""States from squeue, sacct and scontrol: real output of each, and which of them is believed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dattrain.submit import queue
from dattrain.submit.queue import JobState, Requirements

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
    assert "sbatch is not on the PATH" in str(queue.check("#!/bin/bash", Requirements())[0])
    assert queue.task_states("1") == {}


def test_an_unknown_partition_lists_the_known(bin_folder: Path) -> None:
    _program(bin_folder, "sbatch", "echo 'sbatch: error: invalid partition specified: gpuu' >&2; exit 1")
    _program(bin_folder, "sinfo", "echo 'main*'; echo gpu")
    for asked in ("gpuu", "main,gpuu"):
        why, _ = queue.check("x", Requirements(asked))
        assert why == "partition 'gpuu' does not exist here; there are: gpu, main"


def test_a_time_that_the_partition_does_not_allow(bin_folder: Path) -> None:
    _program(bin_folder, "sbatch", "exit 0")
    _program(bin_folder, "sinfo", "echo 'main*|1:00:00'; echo 'gpu|infinite'")
    assert queue.check("x", Requirements(minutes=60)) == (None, None)
    assert queue.check("x", Requirements("gpu", minutes=6000)) == (None, None)
    assert "allows 1:00:00" in str(queue.check("x", Requirements(minutes=61))[0])


UNAVAILABLE = "allocation failure: Requested node configuration is not available"
NODES = ["main*|n1|4|drained", "main*|n2|4|down*", "main*|n3|4|idle", "main*|n4|8|idle", "urgent|n9|64|idle"]


@pytest.mark.parametrize(
    ("need", "nodes", "why", "note"),
    [
        (Requirements(nodes=4, cpus=4), NODES, None, "not available now: n1 (drained), n2 (down*)"),
        (Requirements("main,urgent", nodes=5), NODES, None, "n1 (drained)"),
        (Requirements(nodes=5), NODES, "node configuration", None),  # more nodes than there are
        (
            Requirements(nodes=2, cpus=8),
            NODES,
            "node configuration",
            None,
        ),  # more cores than all but one have
        (Requirements("urgent", nodes=1, cpus=999), NODES, "node configuration", None),
        (
            Requirements("urgent"),
            NODES,
            "node configuration",
            None,
        ),  # nothing is wrong with its nodes: a device, or memory
        (Requirements(), [], "node configuration", None),
        (Requirements(nodes=6), [f"main*|n{n}|4|drained" for n in range(6)], None, "n3 (drained) and 2 more"),
    ],
)
def test_what_the_partition_could_run_is_queued_as_sbatch_would(
    bin_folder: Path, need: Requirements, nodes: list[str], why: str | None, note: str | None
) -> None:
    _program(bin_folder, "sbatch", f"echo '{UNAVAILABLE}' >&2; exit 1")
    _program(bin_folder, "sinfo", 'case "$*" in *-N*) cat <<E\n' + "\n".join(nodes) + "\nE\n;; esac")
    found = queue.check("x", need)
    assert (found[0] is None, found[1] is None) == (why is None, note is None)
    assert (why or "") in str(found[0]) and (note or "") in str(found[1])


def test_a_reservation_that_has_not_begun_is_waited_for(bin_folder: Path) -> None:
    _program(bin_folder, "sbatch", "echo 'allocation failure: Invalid time specified' >&2; exit 1")
    assert queue.check("x", Requirements(reservation="friday")) == (
        None,
        "queued, though reservation friday has not begun",
    )
    assert queue.check("x", Requirements())[0] == "Invalid time specified"


def test_the_check_sees_what_the_submission_sees(bin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _program(bin_folder, "sbatch", f"env > {bin_folder}/seen; cat > {bin_folder}/script")
    monkeypatch.setenv("SBATCH_PARTITION", "urgent")
    monkeypatch.setenv("SBATCH_WCKEY", "key")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    assert queue.check("#SBATCH --partition=main\n", Requirements("main")) == (None, None)
    seen = (bin_folder / "seen").read_text()
    assert "SBATCH_WCKEY=key" in seen and "SBATCH_PARTITION" not in seen and "SLURM_JOB_ID" not in seen


def test_an_array_is_known_by_its_tasks(bin_folder: Path) -> None:
    _program(bin_folder, "squeue", "echo '7_1|RUNNING|None|n1'; echo '8|RUNNING|None|n1'")
    pending = (
        "JobId=9 ArrayJobId=7 ArrayTaskId=2-3%1 JobName=x JobState=PENDING Reason=Resources Dependency=(null)"
    )
    _program(bin_folder, "scontrol", f"echo '{pending}'")
    _program(bin_folder, "sacct", "echo '7_0|FAILED|n1'")
    found = {name: state.state for name, state in queue.task_states("7").items()}
    assert found == {"7_0": "FAILED", "7_1": "RUNNING", "7_2": "PENDING", "7_3": "PENDING"}
    assert list(queue.task_states("7_1")) == ["7_1"]


def test_a_job_that_the_controller_has_forgotten_is_over_and_one_without_an_answer_is_unknown(
    bin_folder: Path,
) -> None:
    assert queue.states(["12"])["12"] == queue.UNKNOWN
    _program(bin_folder, "scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert queue.states(["12"])["12"] == queue.FORGOTTEN
    assert queue.FORGOTTEN.final
