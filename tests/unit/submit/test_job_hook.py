"""What the job hook calls of Slurm, with programs that write down how they were called in place of Slurm's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
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

    def environment(self, job: str) -> dict[str, str]:
        return {
            "PATH": f"{self.programs}:/usr/bin:/bin", "SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        }  # fmt: skip

    def command(self, *arguments: str) -> list[str]:
        (self.run / "submit" / "spec.json").write_text(json.dumps(self.spec))
        module = [str(ENTER), "-m", "dattrain.submit.job_hook"]
        return [sys.executable, *module, arguments[0], str(self.run), *arguments[1:]]

    def watch(self, *arguments: str, job: str = "5", ignoring: bool = False) -> int:
        """Run the job hook; ``ignoring`` SIGTERM, as the batch script has it do."""
        if job not in [e["job"] for e in history.history(self.run) if e["event"] == "submit"]:
            history.record(self.run, "submit", job=job, by="follow-up")
        done = subprocess.run(
            ["sh", "-c", "trap '' TERM; exec \"$@\"", "sh", *self.command(*arguments)] if ignoring else self.command(*arguments),
            env=self.environment(job), capture_output=True, timeout=30,
        )  # fmt: skip
        return done.returncode

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


def test_a_crash_is_followed_by_a_new_job_without_the_node_that_failed_twice_and_the_chain_follows(
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


def test_a_job_beside_the_one_that_trains_leaves_its_history_alone(host: Host) -> None:
    host.watch("begin")
    host.program("scontrol", "echo JobState=RUNNING")
    assert host.watch("begin", job="7") == 1
    assert [e["event"] for e in history.history(host.run)] == ["submit", "begin", "submit"]
    host.program("scontrol", "echo JobState=COMPLETING")
    assert host.watch("begin", job="7") == 0


def test_an_attempt_that_slurm_has_replaced_does_not_record_the_end_of_the_new_one(host: Host) -> None:
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


PREEMPTED = "slurmstepd-n1: error: *** JOB 5 ON n1 CANCELLED AT 2026-11-27T06:17:06 DUE TO PREEMPTION ***\n"
CANCELLED = "slurmstepd-n1: error: *** JOB 5 ON n1 CANCELLED AT 2026-11-27T06:17:06 ***\n"


def _shown(state: str, restarts: int = 0, requeue: str = "kill -9 $PPID") -> str:
    """scontrol: what it shows of the job, and what comes of a requeue."""
    return f"case $1 in show) echo 'JobState={state} Reason=None Restarts={restarts} KillWait = 4';; requeue) {requeue};; esac"


REFUSES = "echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1"


def _submitted(host: Host) -> list[str]:
    return [call for call in host.calls() if call.startswith("sbatch")]


def _requeued(host: Host) -> list[str]:
    return [call for call in host.calls() if call.startswith("scontrol requeue")]


def _told(host: Host, text: str) -> None:
    with open(host.slurm / "5_0_log.err", "a") as log:
        log.write(text)


@pytest.mark.parametrize("requeue", ["scontrol", "follow-up"])
@pytest.mark.parametrize("saved", [True, False])
def test_preempted_by_cancelling_a_new_job_takes_over_and_none_that_waits_is_cancelled(
    tmp_path: Path, requeue: str, saved: bool
) -> None:
    host = Host(tmp_path, requeue)
    host.program("scontrol", _shown("COMPLETING"))
    host.program("sbatch", "kill -TERM $PPID; echo 9")  # the job hook gets SIGTERM while it is at it
    host.program("scancel", "")
    assert host.watch("begin", ignoring=True) == 0
    if saved:
        host.outcome("preempted")
    _told(host, PREEMPTED)
    assert host.watch("end", "0" if saved else "143", ignoring=True) == 75
    (call,) = _submitted(host)
    assert ("--dependency=afterany:5" if requeue == "scontrol" else "--dependency=afternotok:5") in call
    assert not [call for call in host.calls() if call.startswith("scancel")]
    (end,) = [e for e in history.history(host.run) if e["event"] == "end"]
    assert (end["reason"], end["action"]) == ("preempted", "again")


def test_what_slurm_requeues_itself_is_left_to_it(host: Host) -> None:
    host.program("scontrol", _shown("COMPLETING", restarts=1))
    host.watch("begin")
    host.outcome("preempted")
    _told(host, PREEMPTED.replace("PREEMPTION", "JOB REQUEUE"))
    assert host.watch("end", "0") == 75
    assert not _submitted(host) and not _requeued(host)
    assert history.history(host.run)[-1]["reason"] == "requeued"


def test_scancel_is_no_preemption(host: Host) -> None:
    host.program("scontrol", _shown("COMPLETING"))
    host.watch("begin")
    host.outcome("preempted")
    _told(host, CANCELLED)
    assert host.watch("end", "0") == 1
    assert not _submitted(host) and not _requeued(host)
    assert history.history(host.run)[-1]["reason"] == "cancelled"


def test_where_sbatch_is_refused_a_crashed_job_is_requeued_once_its_step_is_gone(host: Host) -> None:
    host.program("sbatch", REFUSES)
    host.program("scontrol", _shown("RUNNING"))
    host.program("squeue", f"[ -f {host.folder}/gone ] || echo 5.0; echo 5.batch; touch {host.folder}/gone")
    host.watch("begin")
    host.publish(3)
    host.watch("end", "137")
    assert _requeued(host) == ["scontrol requeue 5"]
    assert len([call for call in host.calls() if call.startswith("squeue")]) == 2


@pytest.mark.parametrize("requeue", ["scontrol", "follow-up"])
def test_a_run_that_cannot_resume_says_what_slurm_said(tmp_path: Path, requeue: str) -> None:
    host = Host(tmp_path, requeue)
    host.program("sbatch", REFUSES)
    host.program("scontrol", _shown("RUNNING", requeue="echo 'disabled for job 5' >&2; exit 1"))
    assert host.watch("begin") == 0
    warned = [e["text"] for e in history.history(host.run) if e["event"] == "warning"]
    # Known while the job runs, where another should be waiting already.
    assert bool(warned) == (requeue == "follow-up")
    host.publish(3)
    assert host.watch("end", "137") == 75
    warned = [e["text"] for e in history.history(host.run) if e["event"] == "warning"]
    assert "no follow-up: sbatch said: QOSMaxSubmitJobPerUserLimit" in warned
    assert warned[-1] == "not requeued: scontrol said: disabled for job 5"


def test_the_id_of_a_follow_up_is_found_among_what_a_site_prints(host: Host) -> None:
    host.program("scontrol", _shown("RUNNING", requeue="exit 1"))
    host.program(
        "sbatch", r"printf 'Gr\374\337e -----\n'; echo 'job 1 of your 5 today'; echo '17;east'; echo"
    )
    host.watch("begin")
    host.publish(3)
    host.watch("end", "137")
    assert (host.slurm / "17_submitted.pkl").is_file()
    host.program("sbatch", "echo 'Welcome to job 1'")
    history.record(host.run, "begin", job="5", restart=0, nodes=["n1"], checkpoint=None)
    host.watch("end", "137")
    warned = [e["text"] for e in history.history(host.run) if e["event"] == "warning"]
    assert warned[0] == (
        "no follow-up: sbatch gave no job id (see squeue for what it may have queued) but: Welcome to job 1"
    )
    assert not list(host.slurm.glob("*Welcome*"))


@pytest.mark.parametrize(
    ("accounted", "log", "reason", "status"),
    [
        ("PREEMPTED", "", "preempted", 0),
        ("", PREEMPTED, "preempted", 0),
        ("CANCELLED by 0", CANCELLED, "cancelled", 1),
        ("", CANCELLED, "cancelled", 1),
        ("FAILED", "", "node failure", 0),
    ],
)
def test_the_waiting_job_judges_one_that_was_killed_at_once(
    tmp_path: Path, accounted: str, log: str, reason: str, status: int
) -> None:
    host = Host(tmp_path, "follow-up")
    host.program("sbatch", "echo 9")
    host.program("scontrol", "")
    host.program("sacct", f"echo '{accounted}'")
    host.watch("begin")
    _told(host, log)
    assert host.watch("begin", job="9") == status
    (end,) = [e for e in history.history(host.run) if e["event"] == "end"]
    assert end["reason"] == reason


def test_the_guard_takes_over_when_a_preempted_job_cannot_save_in_time(host: Host) -> None:
    host.program("scontrol", _shown("COMPLETING"))
    host.watch("begin")
    _told(host, PREEMPTED)
    guard = subprocess.Popen(host.command("guard"), env=host.environment("5"), stderr=subprocess.PIPE)
    assert guard.stderr is not None
    while not [call for call in host.calls() if "show config" in call]:
        time.sleep(0.05)
    guard.send_signal(signal.SIGTERM)
    assert guard.wait(timeout=60) == 75
    guard.stderr.close()
    assert "--dependency=afterany:5" in _submitted(host)[0]
    assert (
        "before it had saved" in next(e for e in history.history(host.run) if e["event"] == "end")["detail"]
    )


def test_a_job_too_many_does_not_start_a_finished_run(host: Host) -> None:
    host.watch("begin")
    host.outcome("finished")
    host.watch("end", "0")
    assert host.watch("begin", job="9") == 1


@pytest.mark.parametrize("accounted", ["CANCELLED", "TIMEOUT", "NODE_FAIL"])
def test_what_became_of_an_attempt_does_not_stop_the_next_submission(host: Host, accounted: str) -> None:
    host.spec["retries"] = 0
    host.program("sacct", f"echo {accounted}")
    host.watch("begin")
    history.record(host.run, "submit", job="8", by="user")
    assert host.watch("begin", job="8") == 0
    end = next(e for e in history.history(host.run) if e["event"] == "end")
    assert (end["job"], end["action"], end["why"]) == ("5", "over", "submitted again")
    host.program("sacct", "")
    host.spec["retries"] = 1
    assert host.watch("begin", job="8") == 0, "the retries of a submission are its own"


def test_a_job_that_starts_before_its_submission_is_written_down_waits_for_that(host: Host) -> None:
    history.record(host.run, "cancel")
    began = subprocess.Popen(host.command("begin"), env=host.environment("8"))
    time.sleep(0.5)
    history.record(host.run, "submit", job="8", by="user")
    assert began.wait(timeout=30) == 0


@pytest.mark.parametrize("gone", ["5_submission.sh", "5_submitted.pkl"])
def test_without_its_files_there_is_no_follow_up_and_a_word_why(host: Host, gone: str) -> None:
    host.watch("begin")
    host.publish(1)
    (host.slurm / gone).unlink()
    host.program("scontrol", "exit 1")
    assert host.watch("end", "1") == 75
    assert not _submitted(host)
    warned = [e["text"] for e in history.history(host.run) if e["event"] == "warning"]
    assert warned[0] == f"no follow-up: {host.slurm / gone}: No such file or directory"


def test_a_stall_of_this_attempt_is_named_and_one_of_an_earlier_is_not(host: Host) -> None:
    marker = host.run / "logs" / "stalled.json"
    marker.parent.mkdir()
    stall = json.dumps({"rank": 1, "host": "n2", "place": "saving", "silent_s": 60.0, "attempt": "x"})
    marker.write_text(stall)
    host.watch("begin")
    host.publish(3)
    host.watch("end", "70")
    history.record(host.run, "begin", job="5", restart=0, nodes=["n1"], checkpoint=None)
    marker.write_text(stall)
    host.watch("end", "70")
    ends = [e["reason"] for e in history.history(host.run) if e["event"] == "end"]
    assert ends == ["crashed", "stalled"]
