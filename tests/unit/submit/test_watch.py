"""What the bookkeeper tells Slurm, with programs that write down how they were called in place of Slurm's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dattrain
from dattrain.submit import history

ENTER = Path(dattrain.__file__).parent / "submit" / "enter.py"


class Host:
    """The first node of job 5 on n1 and n2: a run folder, and Slurm's commands as far as they are given."""

    def __init__(self, folder: Path, requeue: str = "scontrol") -> None:
        self.folder, self.run, self.programs = folder, folder / "run", folder / "bin"
        self.slurm = folder / "slurm"
        for path in (self.programs, self.slurm, self.run / "submit"):
            path.mkdir(parents=True)
        (self.slurm / "5_submission.sh").write_text("#!/bin/bash\necho hello\n")
        (self.slurm / "5_submitted.pkl").write_bytes(b"pickle")
        self.spec = {
            "retries": 3, "requeue": requeue, "time_s": 3600, "signal_delay_s": 60, "folder": str(self.slurm), "exclude": None,
            "dependents": [str(folder / "next")],
        }  # fmt: skip
        history.record(self.run, "submit", job="5", by="user")
        history.record(folder / "next", "submit", job="6", by="user")

    def program(self, name: str, script: str) -> None:
        path = self.programs / name
        path.write_text(f'#!/bin/sh\necho "{name} $@" >> {self.folder}/calls\n{script}\n')
        path.chmod(0o755)

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.is_file() else []

    def watch(self, *arguments: str, job: str = "5") -> int:
        (self.run / "submit" / "spec.json").write_text(json.dumps(self.spec))
        environment = {
            "PATH": f"{self.programs}:/usr/bin:/bin", "SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        }  # fmt: skip
        command = [
            sys.executable,
            str(ENTER),
            "-m",
            "dattrain.submit.watch",
            arguments[0],
            str(self.run),
            *arguments[1:],
        ]
        return subprocess.run(command, env=environment, capture_output=True, timeout=30).returncode

    def publish(self, step: int) -> None:
        folder = self.run / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")

    def outcome(self, status: str, job: str = "5") -> None:
        (history.attempt_folder(self.run, job, 0) / "outcome.json").write_text(
            json.dumps({"status": status, "step": 7})
        )


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = Host(tmp_path)
    made.program("scontrol", "case $1 in requeue) kill -9 $PPID;; esac")
    made.program("sbatch", "echo 9")
    return made


def test_a_finished_run_ends_its_job_well(host: Host) -> None:
    assert host.watch("begin") == 0
    host.outcome("finished")
    assert host.watch("end", "0") == 0
    assert not [call for call in host.calls() if "requeue" in call or "sbatch" in call]


def test_a_preempted_run_is_requeued(host: Host) -> None:
    host.watch("begin")
    host.outcome("preempted")
    host.watch("end", "0")
    assert "scontrol requeue 5" in host.calls()
    assert history.history(host.run)[-1]["action"] == "again"


def test_where_scontrol_is_missing_a_follow_up_takes_over(host: Host) -> None:
    (host.programs / "scontrol").unlink()
    host.watch("begin")
    host.outcome("preempted")
    assert host.watch("end", "0") == 75
    (call,) = [call for call in host.calls() if call.startswith("sbatch")]
    assert "--dependency=afterany:5" in call
    assert (host.slurm / "9_submission.sh").read_text() == "#!/bin/bash\necho hello\n"
    assert (host.slurm / "9_submitted.pkl").read_bytes() == b"pickle"
    assert history.history(host.run)[-1]["job"] == "9"


def test_a_crash_goes_on_as_a_new_job_without_the_node_that_failed_twice_and_the_chain_follows(
    host: Host,
) -> None:
    for attempt in (1, 2):
        host.watch("begin")
        host.publish(attempt)
        with open(host.slurm / "5_0_log.err", "a") as log:
            log.write("dattrain: attempt on n1,n2\nsrun: error: n2: task 1: Killed\n")
        assert host.watch("end", "137") == 75
    assert [e["node"] for e in history.history(host.run) if e["event"] == "end"] == ["n2", "n2"]
    assert not [call for call in host.calls() if "requeue" in call]
    first, second = [call for call in host.calls() if call.startswith("sbatch")]
    assert "--dependency=afterany:5" in first
    assert "--exclude" not in first
    assert "--exclude=n2" in second
    assert "scontrol update JobId=6 Dependency=afterok:9" in host.calls()


def test_a_follow_up_is_queued_before_training_and_cancelled_when_there_is_no_use(tmp_path: Path) -> None:
    host = Host(tmp_path, requeue="follow-up")
    host.program("scontrol", "")
    host.program("sbatch", "echo 9")
    host.program("scancel", "")
    assert host.watch("begin") == 0
    (call,) = [call for call in host.calls() if call.startswith("sbatch")]
    assert "--dependency=afternotok:5" in call
    assert "scontrol update JobId=6 Dependency=afterok:5?afterok:9" in host.calls()
    assert host.watch("end", "1") == 1
    assert "scancel 9" in host.calls()


def test_a_job_that_vanished_is_judged_by_the_next_one(host: Host) -> None:
    host.program("sinfo", "echo 'n1 idle'; echo 'n2 down*'")
    host.watch("begin")
    host.publish(3)
    assert host.watch("begin", job="5") == 0
    end = history.history(host.run)[-2]
    assert (end["reason"], end["detail"], end["action"]) == ("node failure", "n2 went down", "again")
    for _ in range(3):
        assert host.watch("begin") == 0
    assert host.watch("begin") == 1
    assert "in a row without a new checkpoint" in history.history(host.run)[-1]["why"]


def test_nothing_starts_a_cancelled_run(host: Host) -> None:
    history.record(host.run, "cancel")
    assert host.watch("begin") == 1
    assert history.history(host.run)[-1]["event"] == "cancel"


def test_a_cancelled_run_is_not_requeued_though_it_was_saved(host: Host) -> None:
    host.watch("begin")
    host.outcome("preempted")
    history.record(host.run, "cancel")
    assert host.watch("end", "0") == 1
    assert not [call for call in host.calls() if "requeue" in call]


def test_a_job_beside_the_one_that_trains_leaves_its_books_alone(host: Host) -> None:
    host.watch("begin")
    host.program("scontrol", "echo JobState=RUNNING")
    assert host.watch("begin", job="7") == 1
    assert [e["event"] for e in history.history(host.run)] == ["submit", "begin"]
    host.program("scontrol", "echo JobState=COMPLETING")
    assert host.watch("begin", job="7") == 0


def test_an_attempt_that_slurm_has_replaced_does_not_close_the_books_of_the_new_one(host: Host) -> None:
    host.watch("begin")
    host.watch("begin", job="7")
    before = history.history(host.run)
    assert before[-1]["job"] == "7"
    assert host.watch("end", "1") == 75
    assert history.history(host.run) == before


def test_a_job_that_another_process_keeps_out_of_the_folder_is_not_tried_again(host: Host) -> None:
    host.watch("begin")
    host.publish(3)  # by the other one
    report = {
        "rank": 0,
        "node": "n1",
        "error": "run is being trained by process 1",
        "user_error": True,
        "held": True,
    }
    (history.attempt_folder(host.run, "5", 0) / "rank_00000.json").write_text(json.dumps(report))
    assert host.watch("end", "1") == 1
    end = history.history(host.run)[-1]
    assert (end["reason"], end["action"], end["why"]) == ("refused", "stop", report["error"])
