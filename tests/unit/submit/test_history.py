"""What ended an attempt, and what follows from it."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dattrain
from dattrain.submit import history
from dattrain.submit.follow_up import script_of


def _classify(**changes: Any) -> tuple[str, str, str | None]:
    given_: dict[str, Any] = {
        "status": 1, "outcome": None, "slurm_state": "RUNNING", "elapsed_s": 100.0, "time_s": 3600.0, "signal_delay_s": 60.0,
        "stderr": "", "reports": [],
    }  # fmt: skip
    return history.classify(**{**given_, **changes})


def test_finished_needs_all_ranks_to_have_ended_well() -> None:
    done = {"status": "finished", "step": 9}
    assert _classify(status=0, outcome=done)[0] == "finished"
    assert _classify(status=1, outcome=done)[0] == "crashed"


def test_the_same_save_is_a_preemption_or_the_time_limit_by_the_clock() -> None:
    saved = {"status": "preempted", "step": 5}
    assert _classify(status=0, outcome=saved)[0] == "preempted"
    assert _classify(status=0, outcome=saved, elapsed_s=3480.0)[0] == "time limit"
    assert _classify(outcome=saved, slurm_state="CANCELLED")[0] == "cancelled"
    # What scontrol shows of a job while scancel ends it; requeueing would raise it from the dead.
    assert _classify(outcome=saved, slurm_state="COMPLETING")[0] == "cancelled"
    assert _classify(slurm_state="NODE_FAIL")[0] == history.NODE_FAILURE
    # While Slurm takes the job off the other nodes its state may be that of any job that is ended.
    dead = "srun: error: n1: tasks 0-1: Exited with exit code 1\nsrun: error: Node failure on n2\n"
    node_failure = (history.NODE_FAILURE, "n2 went down", None)
    assert _classify(slurm_state="COMPLETING", stderr=dead) == node_failure
    told = "slurmstepd-n1: error: *** JOB 16 ON n1 CANCELLED AT 2026-11-24T22:14:56 DUE TO NODE FAILURE ***"
    assert _classify(slurm_state="CANCELLED", stderr=told)[0] == history.NODE_FAILURE
    assert _classify(slurm_state="TIMEOUT")[0] == "time limit"


@pytest.mark.parametrize("state", ["PREEMPTED", "REQUEUED"])
def test_what_slurm_takes_away_resumes_whether_it_was_saved_or_not(state: str) -> None:
    saved = {"status": "preempted", "step": 5}
    assert _classify(outcome=saved, slurm_state=state) == (state.lower(), "saved at step 5", None)
    reason, detail, _ = _classify(slurm_state=state, stderr="srun: error: n1: task 0: Killed\n")
    assert reason == state.lower()
    assert "before it had saved" in detail
    assert _decide(*[_end(reason, new=False)] * 20)[0] == "again"
    early = _classify(outcome={"status": "preempted", "step": None}, slurm_state=state)
    assert early == (state.lower(), "before training had begun", None)


def test_a_task_that_the_notice_of_a_preemption_has_ended_is_no_crash() -> None:
    reason, *_ = _classify(slurm_state="PREEMPTING", stderr="srun: error: n1: task 0: Terminated\n")
    assert reason == "preempted"


@pytest.mark.parametrize("number", [1, 2])
def test_a_signal_that_asks_for_a_save_before_anybody_listens_is_no_crash(number: int) -> None:
    stderr = (
        f"srun: error: n2: task 3: User defined signal {number}\nsrun: error: n1: tasks 0-1: Terminated\n"
    )
    assert _classify(stderr=stderr)[0] == "preempted"
    # What a machine's memory guard sends may come for ever.
    assert _classify(stderr="srun: error: n2: task 3: Terminated\n")[0] == "crashed"


def test_a_stall_is_called_one_and_counts_as_a_crash() -> None:
    stalled = {"rank": 1, "host": "n2", "place": "saving", "silent_s": 60.5}
    stderr = "srun: error: n1: task 0: Exited with exit code 70\n"
    found = _classify(stderr=stderr, stalled=stalled)
    assert found == ("stalled", "rank 1 on n2 was silent for 60.5 s in 'saving'", None)
    assert _decide(*[_end("stalled")] * 3)[0] == "again"
    assert _decide(*[_end("stalled"), _end("crashed")] * 2)[0] == "stop"
    assert _classify(status=0, outcome={"status": "finished", "step": 9}, stalled=stalled)[0] == "finished"


def test_a_task_that_could_not_speak_is_quoted() -> None:
    words = {0: "first", 2: "ModuleNotFoundError: No module named 'submitit'"}
    stderr = "srun: error: n2: tasks 2-3: Exited with exit code 1\n"
    detail = _classify(stderr=stderr, last_error=words.__getitem__)[1]
    assert detail == "Exited with exit code 1: ModuleNotFoundError: No module named 'submitit'"
    assert _classify(last_error=words.__getitem__)[1] == "the tasks ended with status 1: first"
    killed = (
        "slurmstepd-n2: error: Detected 1 oom_kill event in StepId=5.0.\nsrun: error: n2: task 2: Killed\n"
    )
    assert _classify(stderr=killed)[1].startswith("out of memory")


def test_the_first_failure_is_the_first_task_that_srun_saw_die() -> None:
    stderr = (
        "srun: error: n3: task 5: Killed\n"
        "Traceback ... connection closed by peer\n"
        "srun: error: n1: tasks 0-1: Exited with exit code 1\n"
    )
    # The neighbours' reports come from n1 and are earlier than n3's, which was killed and wrote none.
    reports = [{"rank": 0, "node": "n1", "error": "connection closed by peer"}]
    assert _classify(stderr=stderr, reports=reports) == ("crashed", "Killed", "n3")
    reports.append({"rank": 4, "node": "n3", "error": "connection closed by peer"})
    assert _classify(stderr=stderr, reports=reports) == ("crashed", "Killed", "n3")


def test_the_error_of_the_node_that_failed_first_is_shown_if_it_wrote_one() -> None:
    stderr = "srun: error: n3: task 5: Exited with exit code 1\nsrun: error: n1: tasks 0-1: Exited with exit code 1\n"
    reports = [
        {"rank": 0, "node": "n1", "error": "connection closed by peer"},
        {"rank": 5, "node": "n3", "error": "RuntimeError: boom"},
    ]
    assert _classify(stderr=stderr, reports=reports) == ("crashed", "RuntimeError: boom", "n3")


def test_an_error_that_a_user_can_mend_blames_no_node() -> None:
    reports = [{"rank": 1, "node": "n2", "error": "no such shard", "user_error": True}]
    assert _classify(reports=reports) == ("crashed", "no such shard", None)


def _end(reason: str, *, new: bool = True, node: str | None = None) -> history.Event:
    return {"event": "end", "reason": reason, "detail": "why", "node": node, "new": new, "time": 0}


SUBMIT: history.Event = {"event": "submit", "by": "user", "job": "1"}


def _decide(*events: history.Event, retries: int = 3) -> tuple[str, str, list[str]]:
    return history.decide([SUBMIT, *events], retries=retries, checkpoint_new=events[-1]["new"])


def test_preemptions_go_on_for_ever() -> None:
    assert _decide(*[_end("preempted", new=False)] * 50)[0] == "again"


def test_a_crash_is_forgiven_only_after_a_new_checkpoint_and_only_so_often() -> None:
    assert _decide(_end("crashed"))[0] == "again"
    action, why, _ = _decide(_end("crashed", new=False))
    assert action == "stop"
    assert "new checkpoint" in why
    assert _decide(*[_end("crashed")] * 3)[0] == "again"
    action, why, _ = _decide(*[_end("crashed")] * 4)
    assert action == "stop"
    assert "--retries is 3" in why
    assert _decide(_end("crashed"), retries=0)[0] == "stop"


def test_a_time_limit_that_leaves_no_checkpoint_ends_the_run() -> None:
    assert _decide(*[_end("time limit")] * 50)[0] == "again"
    assert _decide(_end("time limit", new=False))[0] == "stop"


def test_the_node_that_failed_twice_is_left_out() -> None:
    assert _decide(_end("crashed", node="n2"))[2] == []
    assert _decide(_end("crashed", node="n2"), _end("crashed", node="n3"))[2] == []
    assert _decide(_end("crashed", node="n2"), _end("preempted"), _end("crashed", node="n2"))[2] == ["n2"]


def test_node_failures_before_the_first_checkpoint_are_forgiven_in_a_row_of_retries() -> None:
    cut = _end(history.NODE_FAILURE, new=False)
    assert _decide(cut, cut, cut)[0] == "again"
    assert _decide(cut, cut, cut, cut)[0] == "stop"
    assert _decide(cut, cut, cut, _end(history.NODE_FAILURE), cut)[0] == "again"


def test_cancelled_and_stopped_are_final() -> None:
    for reason in ("stopped", "cancelled"):
        assert _decide(_end(reason))[0] == "stop"
    assert _decide({"event": "cancel", "new": True}, _end("preempted"))[0] == "stop"


def test_a_new_submission_by_hand_forgives_what_was_before() -> None:
    events = [SUBMIT, *[_end("crashed")] * 4, {"event": "cancel"}, SUBMIT, _end("crashed")]
    assert history.decide(events, retries=3, checkpoint_new=True)[0] == "again"
    follow_up = {"event": "submit", "by": "follow-up", "job": "2"}
    events = [SUBMIT, *[_end("crashed")] * 3, follow_up, _end("crashed")]
    assert history.decide(events, retries=3, checkpoint_new=True)[0] == "stop"


@given(st.lists(st.sampled_from(["crashed", "time limit", history.NODE_FAILURE]), min_size=1, max_size=30))
def test_without_progress_every_run_comes_to_an_end(reasons: list[str]) -> None:
    events: list[history.Event] = [SUBMIT]
    for count, reason in enumerate(reasons, 1):
        events.append(_end(reason, new=False))
        if history.decide(events, retries=3, checkpoint_new=False)[0] == "stop":
            return
        assert count <= 3


def test_a_torn_line_loses_nothing_else(tmp_path: Path) -> None:
    history.record(tmp_path, "submit", job="1", by="user")
    path = tmp_path / "submit" / "history.jsonl"
    with open(path, "a") as file:
        file.write('{"event": "beg')
    history.record(tmp_path, "cancel")
    assert [e["event"] for e in history.history(tmp_path)] == ["submit", "cancel"]


def test_a_checkpoint_exists_when_its_manifest_does(tmp_path: Path) -> None:
    assert history.newest_checkpoint(tmp_path) is None
    for name in ("step_00000005", "step_00000007", "step_00000009", "step_x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000005" / "manifest.json").write_text("{}")
    (tmp_path / "checkpoints" / "step_00000007" / "manifest.json").write_text("{}")
    (tmp_path / "checkpoints" / "step_x" / "manifest.json").write_text("{}")
    assert history.newest_checkpoint(tmp_path) == 7


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("n1", ["n1"]),
        ("n[1-3,7],login", ["n1", "n2", "n3", "n7", "login"]),
        ("gpu[008-010]-ib", ["gpu008-ib", "gpu009-ib", "gpu010-ib"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
    ],
)
def test_node_lists(text: str, names: list[str]) -> None:
    assert history.expand(text) == names


def test_the_follow_up_of_an_arrays_task_is_a_job_of_its_own() -> None:
    text = '#SBATCH --array=0-2%3\n#SBATCH --output=/f/%A_%a_0.out\nX="${R[${SLURM_ARRAY_TASK_ID:-0}]}"\n'
    assert script_of(text, 2) == '#SBATCH --output=/f/%j_0.out\nX="${R[2]}"\n'
    assert script_of(text, None) == text


def test_the_job_hook_needs_the_standard_library_alone(tmp_path: Path) -> None:
    package = Path(dattrain.__file__).parent
    shutil.copytree(
        package / "submit", tmp_path / "dattrain" / "submit", ignore=shutil.ignore_patterns("__pycache__")
    )
    for module in ("__init__", "errors", "files", "urls"):
        text = (package / f"{module}.py").read_text()
        ast.parse(text, feature_version=(3, 8))
        (tmp_path / "dattrain" / f"{module}.py").write_text(text)
    (tmp_path / "run" / "submit").mkdir(parents=True)
    (tmp_path / "run" / "submit" / "spec.json").write_text(json.dumps({"retries": 3, "requeue": "scontrol"}))
    history.record(tmp_path / "run", "submit", job="5", by="user")
    done = subprocess.run(
        [sys.executable, "-S", str(tmp_path / "dattrain" / "submit" / "enter.py"), "-m", "dattrain.submit.job_hook", "begin", str(tmp_path / "run")],
        env={"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n[1-2]", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    _, event = history.history(tmp_path / "run")
    assert event["nodes"] == ["n1", "n2"]
    assert event["checkpoint"] is None
