"""What status makes of a history and of Slurm's word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dattrain.cli import main as cli
from dattrain.engine import starts
from dattrain.runtime import owner
from dattrain.submit import history, run_status
from dattrain.submit.queue import FORGOTTEN, UNKNOWN, JobState

SUBMIT: history.Event = {"event": "submit", "by": "user", "job": "1", "time": 0}
BEGIN: history.Event = {
    "event": "begin",
    "job": "1",
    "restart": 0,
    "nodes": ["n1"],
    "checkpoint": None,
    "time": 1,
}


WARNING: history.Event = {"event": "warning", "job": "1", "text": "no follow-up: sbatch said: no"}


def _end(action: str, reason: str) -> history.Event:
    return {
        "event": "end", "job": "1", "reason": reason, "detail": "d", "action": action, "why": "w", "time": 2, "checkpoint": 5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("events", "slurm", "state"),
    [
        ([SUBMIT], JobState("PENDING", "Resources"), "waiting"),
        ([SUBMIT], JobState("PENDING", "DependencyNeverSatisfied"), "cancelled"),
        ([SUBMIT], JobState("CANCELLED"), "cancelled"),
        ([SUBMIT, BEGIN], JobState("RUNNING"), "running"),
        ([SUBMIT, BEGIN], JobState("NODE_FAIL", source="sacct"), "waiting"),
        # Slurm starts none again that it calls so.
        ([SUBMIT, BEGIN], JobState("PREEMPTED", source="sacct"), "failed"),
        ([SUBMIT, BEGIN], JobState("SUSPENDED"), "running"),
        ([SUBMIT, BEGIN, _end("again", "requeued")], JobState("PENDING", "JobHeldAdmin"), "waiting"),
        ([SUBMIT, BEGIN, _end("again", "crashed"), WARNING], JobState("FAILED"), "failed"),
        ([SUBMIT, BEGIN, WARNING], JobState("RUNNING"), "running"),
        ([SUBMIT, BEGIN], JobState("TIMEOUT"), "failed"),
        ([SUBMIT, BEGIN], JobState("FAILED"), "failed"),
        ([SUBMIT, BEGIN], UNKNOWN, "unknown"),
        ([SUBMIT, BEGIN, _end("again", "crashed"), WARNING], FORGOTTEN, "failed"),
        ([SUBMIT, BEGIN, _end("again", "preempted")], JobState("PENDING", "BeginTime"), "waiting"),
        ([SUBMIT, BEGIN, _end("done", "finished")], UNKNOWN, "finished"),
        ([SUBMIT, BEGIN, _end("stop", "stopped")], JobState("FAILED"), "stopped"),
        ([SUBMIT, BEGIN, _end("stop", "crashed")], JobState("FAILED"), "failed"),
        ([SUBMIT, BEGIN, {"event": "cancel"}], JobState("CANCELLED"), "cancelled"),
        ([SUBMIT, BEGIN, {"event": "cancel"}, SUBMIT], JobState("PENDING"), "waiting"),
        ([], UNKNOWN, "not submitted"),
    ],
)
def test_states(events: list[history.Event], slurm: JobState, state: str) -> None:
    assert run_status.state_of(events, slurm)[0] == state


def test_a_report_names_step_speed_and_the_reason_of_each_restart(tmp_path: Path) -> None:
    history.record(tmp_path, "submit", job="1", by="user")
    history.record(tmp_path, "begin", job="1", restart=0, nodes=["n1"], checkpoint=None)
    history.record(
        tmp_path, "end", job="1", restart=0, reason="preempted", detail="saved at step 4", checkpoint=4, new=True,
        action="again", why="preempted",
    )  # fmt: skip
    history.record(tmp_path, "begin", job="1", restart=1, nodes=["n2"], checkpoint=4)
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 6, "loss": 2.5, "images_per_s": 100.0}\n{"step": 7, "lo'
    )
    one = run_status.status_of(tmp_path, {"1": JobState("RUNNING", "", "n2")})
    shown = run_status.render([one])
    assert one.state == "running"
    assert (one.step, one.loss, one.images_per_s) == (6, 2.5, 100.0)
    assert "restart 1: " in shown
    assert "preempted: saved at step 4, checkpoint of step 4" in shown


def test_a_job_that_is_held_or_preempted_for_good_says_so() -> None:
    events = [SUBMIT, BEGIN, _end("again", "requeued")]
    assert "held (JobHeldUser)" in run_status.state_of(events, JobState("PENDING", "JobHeldUser"))[1]
    assert "held" in run_status.state_of(events, JobState("PENDING", "job requeued in held state"))[1]
    assert "preempted" in run_status.state_of([SUBMIT, BEGIN], JobState("PREEMPTED"))[1]


def test_what_keeps_a_run_from_resuming_is_said_while_it_runs_and_after(tmp_path: Path) -> None:
    events = [SUBMIT, BEGIN, WARNING]
    for event in events:
        history.record(tmp_path, **{key: value for key, value in event.items() if key != "time"})
    one = run_status.status_of(tmp_path, {"1": JobState("RUNNING")})
    assert "    warning: no follow-up: sbatch said: no" in run_status.render([one]).splitlines()
    assert (
        "sbatch said: no" in run_status.state_of([*events, _end("again", "crashed")], JobState("FAILED"))[1]
    )
    # A later attempt has overcome it.
    history.record(tmp_path, "begin", job="1", restart=1, nodes=["n1"], checkpoint=None)
    assert run_status.status_of(tmp_path, {"1": JobState("RUNNING")}).warnings == ()


@pytest.mark.parametrize(
    ("log", "shown", "words"),
    [
        (
            "SyntaxError: future feature annotations is not defined\n",
            "ExitCode=1:0",
            "FAILED, exit code 1: SyntaxError: future",
        ),
        ("", "ExitCode=0:9 Reason=RaisedSignal:9(Killed)", "killed by signal 9"),
        (None, "Reason=JobLaunchFailure ExitCode=0:53", "could not open the job's log"),
        (None, "", "1_0_log.err is not there"),
    ],
)
def test_a_job_that_recorded_nothing_is_explained_by_its_log_or_by_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: str | None, shown: str, words: str
) -> None:
    programs, run = tmp_path / "bin", tmp_path / "run"
    programs.mkdir()
    (programs / "scontrol").write_text(f"#!/bin/sh\necho 'JobId=1 {shown}'\n")
    (programs / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    history.record(run, "submit", job="1", by="user")
    (run / "submit" / "spec.json").write_text(json.dumps({"folder": str(tmp_path)}))
    if log is not None:
        (tmp_path / "1_0_log.err").write_text(log)
    one = run_status.status_of(run, {"1": JobState("FAILED")})
    assert one.state == "failed"
    assert words in one.why


def test_logs_of_a_rank_that_never_began_are_those_of_the_batch_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    history.record(run, "submit", job="1", by="user")
    (run / "submit" / "spec.json").write_text(json.dumps({"folder": str(tmp_path)}))
    (tmp_path / "1_0_log.err").write_text("module: command not found\n")
    assert cli.main(["logs", str(run), "--rank", "7"]) == 0
    assert capsys.readouterr().out == "module: command not found\n"
    (run / "logs").mkdir()
    (run / "logs" / "rank_7.log").write_text("trained\n")
    assert cli.main(["logs", str(run), "--rank", "7"]) == 0
    assert capsys.readouterr().out == "trained\n"


def test_a_waiting_follow_up_does_not_hide_the_job_that_runs(tmp_path: Path) -> None:
    history.record(tmp_path, "submit", job="1", by="user")
    history.record(tmp_path, "begin", job="1", restart=0, nodes=["n1"], checkpoint=None)
    history.record(tmp_path, "submit", job="2", by="follow-up", after="1")
    one = run_status.status_of(tmp_path, {"1": JobState("RUNNING"), "2": JobState("PENDING", "Dependency")})
    assert (one.job, one.state) == ("1", "running")


@pytest.mark.parametrize(
    ("step", "epochs", "last"), [(1, 60, 720), (7, 60, 720), (719, 60, 720), (1, 0.5, 6), (4, 0.3, 4)]
)
def test_the_last_step_is_the_same_from_the_first_on(
    tmp_path: Path, step: int, epochs: float, last: int
) -> None:
    (tmp_path / "config.yaml").write_text(
        f"name: demo\ntrain: {{global_batch: 32, micro_batch: 8}}\nschedule: {{epochs: {epochs}, warmup_epochs: 0}}\n"
    )
    row = {"step": step, "samples": 32 * step, "epoch": round(step / 12, 6)}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert run_status.status_of(tmp_path, {}).last_step == last


def test_a_run_that_stopped_early_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "data: {val: v}\ntrain: {global_batch: 8, micro_batch: 8, early_stopping_patience: 2}\nschedule: {warmup_epochs: 0}\n"
    )
    for event in (SUBMIT, BEGIN, _end("done", "finished")):
        history.record(tmp_path, **{k: v for k, v in event.items() if k != "time"})
    row = {"step": 6, "samples": 48, "epoch": 0.5, "top1": 9.0, "evaluations_without_improvement": 2}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    shown = run_status.render([run_status.status_of(tmp_path, {})])
    assert "finished: stopped early: top1 has not improved for 2 evaluations" in shown
    (tmp_path / "metrics.jsonl").write_text(json.dumps({**row, "evaluations_without_improvement": 1}) + "\n")
    assert "stopped early" not in run_status.render([run_status.status_of(tmp_path, {})])


def test_a_segmentation_shows_its_miou(tmp_path: Path) -> None:
    rows = {"a": {"top1": 71.5}, "b": {"miou": 43.21}}
    for name, metrics in rows.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(
            json.dumps({"step": 6, "samples": 48, **metrics}) + "\n"
        )
    both = [run_status.status_of(tmp_path / name, {}) for name in rows]
    assert " MIOU " in run_status.render(both[1:]) and "43.21" in run_status.render(both[1:])
    assert " TOP-1 " in run_status.render(both[:1]) and " TOP-1/MIOU " in run_status.render(both)


def test_a_run_by_hand_is_known_by_its_starts_and_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (run / "config.yaml").write_text("name: a\n")
    (run / "metrics.jsonl").write_text(
        '{"step": 3, "samples": 96, "epoch": 1.5, "loss": 2.0, "images_per_s": 50.0, "eta_s": 61.0}\n'
    )
    starts.begin(run, {"launcher": "single", "step": 0, "last_step": 7})

    def now() -> tuple[str, str]:
        one = run_status.status_of(run, {})
        return one.state, one.why

    with owner.acquire(run):
        one = run_status.status_of(run, {})
        assert (one.state, one.step, one.last_step, one.epoch) == ("running", 3, 7, 1.5)
        assert (one.images_per_s, one.eta_s) == (50.0, 61.0) and "3/7   1.50   50.0" in run_status.render(
            [one]
        )
    state, why = now()
    assert state == "crashed" and "dattrain train runs/a goes on" in why
    assert cli.main(["status"]) == 1 and "crashed" in capsys.readouterr().out
    for status, why, shown in (
        ("stopped", "Ctrl-C (SIGINT)", "stopped"),
        ("preempted", "SIGTERM", "stopped"),
        ("failed", "no room", "failed"),
        ("finished", "schedule.epochs=3", "finished"),
    ):
        starts.end(run, status, why, 3)
        found = now()
        assert found[0] == shown and (why in found[1]) == (status != "finished")
    assert cli.main(["status"]) == 0
    # What was submitted afterwards counts, and what was typed after that.
    history.record(run, "submit", job="1", by="user", time=starts.began(starts.read(run)[-1]) + 1)
    assert run_status.status_of(run, {"1": JobState("PENDING", "Resources")}).state == "waiting"
