"""The bookkeeper of a run's jobs: before and after the tasks of each job, it writes down what happened and does what is next.

It runs on the host of the batch script with any Python >= 3.8 and the standard library alone, from the snapshot, so that
neither a container nor a broken environment of the tasks can keep a run from going on::

    python3 enter.py -m dattrain.submit.watch begin RUN        # before srun; a status other than 0 ends the job there
    python3 enter.py -m dattrain.submit.watch guard RUN        # beside srun; requeues a job whose save outran its time limit
    python3 enter.py -m dattrain.submit.watch end RUN STATUS   # after srun, with its exit status; requeues, or lets the next one start

What it writes and how it judges is in ``dattrain.submit.history``. Not here: the signal and the save
(``dattrain.runtime.preempt``, ``dattrain.engine.trainer``), and the first submission (``dattrain.submit.launch``).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Sequence  # noqa: UP035 (Python 3.8 runs this file)

from dattrain.submit.history import (
    NODE_FAILURE,
    Event,
    attempt_folder,
    cancelled,
    classify,
    decide,
    expand,
    history,
    newest_checkpoint,
    open_attempt,
    read_spec,
    record,
    since_submission,
)
from dattrain.submit.shell import clean_environment

# Exit statuses of a batch script. Slurm shows them; afterok and afternotok see zero or not.
DONE, STOPPED, AGAIN, BROKEN = 0, 3, 75, 1

MARK = "dattrain: attempt on "
"""Divides the attempts in the error file, which every restart appends to."""


def job_id() -> str:
    """This job as squeue and submitit name it: ``123``, or ``123_4`` within an array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return "{}_{}".format(array, os.environ["SLURM_ARRAY_TASK_ID"]) if array else os.environ["SLURM_JOB_ID"]


def begin(run: str) -> int:
    """Close the books of an attempt that vanished, judge it, open those of this one. Returns the status to exit with."""
    spec, job = read_spec(run), job_id()
    restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    if cancelled(history(run)):
        _say("not started: cancelled by dattrain cancel")
        return BROKEN
    vanished = open_attempt(history(run))
    now = newest_checkpoint(run)
    if vanished is not None:
        detail = _what_happened(vanished)
        new = now is not None and now != vanished.get("checkpoint")
        end_event = {"event": "end", "reason": NODE_FAILURE, "detail": detail, "new": new}
        action, why, _ = decide(history(run) + [end_event], retries=spec["retries"], checkpoint_new=new)
        record(
            run, "end", job=vanished["job"], restart=vanished["restart"], reason=NODE_FAILURE, detail=detail,
            node=None, checkpoint=now, new=new, action=action, why=why,
        )  # fmt: skip
        if action != "again":
            _say("not started again: " + why)
            return BROKEN
    nodes = expand(os.environ.get("SLURM_JOB_NODELIST", ""))
    record(run, "begin", job=job, restart=restart, nodes=nodes, checkpoint=now)
    attempt_folder(run, job, restart).mkdir(parents=True, exist_ok=True)
    _say(
        "attempt on {}: {}".format(
            ",".join(nodes), f"from step {now}" if now is not None else "from the start"
        )
    )
    if spec["requeue"] == "follow-up":
        _queue_next(run, spec, job, "afternotok:" + job, _excluded(run, spec))
    return 0


def end(run: str, status: int) -> int:
    """Write down how the attempt ended and act on it. Returns the exit status of the batch script."""
    _end_guard()
    spec, job = read_spec(run), job_id()
    restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    events = history(run)
    started = open_attempt(events)
    if started is None:
        # The guard came first.
        return AGAIN
    folder = attempt_folder(run, job, restart)
    outcome = _json(folder / "outcome.json")
    reports = [r for r in map(_json, sorted(folder.glob("rank_*.json"))) if r]
    reports.sort(key=lambda r: r.get("time", 0))
    state = _slurm_state()
    reason, detail, node = classify(
        status=status, outcome=outcome, slurm_state=state, elapsed_s=time.time() - started["time"],
        time_s=spec["time_s"], signal_delay_s=spec["signal_delay_s"], stderr=_stderr(spec, job),
        reports=reports,
    )  # fmt: skip
    now = newest_checkpoint(run)
    new = now is not None and now != started["checkpoint"]
    action, why, bad = decide(
        [*events, {"event": "end", "reason": reason, "detail": detail, "node": node, "new": new}],
        retries=spec["retries"],
        checkpoint_new=new,
    )
    record(
        run, "end", job=job, restart=restart, reason=reason, detail=detail, node=node, checkpoint=now, new=new,
        action=action, why=why, **({"exclude": bad} if bad else {}),
    )  # fmt: skip
    _say(
        "{}: {}; {}".format(
            reason, detail, {"again": "goes on (" + why + ")", "done": "done"}.get(action, "ends: " + why)
        )
    )
    if action == "done":
        return DONE
    if action == "stop":
        if spec["requeue"] == "follow-up":
            _cancel_next(run, job)
        return STOPPED if reason == "stopped" else BROKEN
    excluded = _excluded(run, spec)
    if spec["requeue"] == "follow-up":
        if bad:
            _exclude_from_next(run, spec, job, excluded)
        return AGAIN
    if reason == NODE_FAILURE:
        # Slurm requeues it by itself.
        return AGAIN
    after = "afterany:" + job
    if reason == "crashed" or state == "TIMEOUT":
        # Not the same job again: what Slurm was told about ending its step may be told once more a minute later, when a
        # busy node did not answer in time, and would end the new attempt, whose step has the same number. Nor can the
        # nodes of a job that runs be narrowed. The new job waits until the old one has let go of everything.
        _queue_next(run, spec, job, after, excluded)
        return AGAIN
    if not _done("scontrol", "requeue", job):
        _say("scontrol requeue failed; a follow-up job takes over (set requeue: follow-up in the profile)")
        _queue_next(run, spec, job, after, excluded)
        return AGAIN
    # Slurm now kills this script; waiting for that keeps the job from being seen as ended.
    time.sleep(60)
    return AGAIN


def guard(run: str) -> int:
    """Wait beside srun. A job told to end by its time limit has KillWait seconds; what has not saved by then goes on through here,
    since this script and srun are killed together. ``end`` ends this process."""
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(time.time()))
    # Bash reports a job that a signal has killed, and not one that ends by itself.
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
    while not told:
        time.sleep(1)
    patience = max(1.0, _kill_wait() - 4)
    while time.time() < told[0] + patience and open_attempt(history(run)) is not None:
        time.sleep(0.5)
    if open_attempt(history(run)) is None or _slurm_state() != "TIMEOUT":
        return 0
    return end(run, 1)


def _end_guard() -> None:
    pid = os.environ.get("DATTRAIN_GUARD")
    if pid and int(pid) != os.getpid():
        with contextlib.suppress(OSError):
            os.kill(int(pid), signal.SIGUSR1)


def _kill_wait() -> float:
    try:
        shown = subprocess.run(
            ["scontrol", "show", "config"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, timeout=10,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return 30.0
    match = re.search(r"KillWait\s*=\s*(\d+)", shown)
    return float(match.group(1)) if match else 30.0


def script_for_follow_up(text: str, task: int | None) -> str:
    """The batch script of a follow-up: the same, but for a job of its own where the first was task ``task`` of an array."""
    if task is None:
        return text
    lines = [line for line in text.splitlines(keepends=True) if not line.startswith("#SBATCH --array")]
    return "".join(lines).replace("%A_%a", "%j").replace("${SLURM_ARRAY_TASK_ID:-0}", str(task))


def _queue_next(
    run: str, spec: dict[str, Any], job: str, dependency: str, exclude: Sequence[str]
) -> str | None:
    """sbatch the same script again, give submitit its pickle, and turn the jobs that wait for this one to the new one too."""
    folder = Path(spec["folder"])
    array, _, task = job.partition("_")
    original = folder / f"{array}_submission.sh"
    text = script_for_follow_up(original.read_text(encoding="utf-8"), int(task) if task else None)
    script = folder / f"follow_up_of_{job}.sh"
    script.write_text(text, encoding="utf-8")
    command = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes", "--dependency=" + dependency]
    command += ["--exclude=" + ",".join(exclude)] if exclude else []
    try:
        done = subprocess.run(
            [*command, str(script)],
            stdout=subprocess.PIPE,
            text=True,
            env=clean_environment(os.environ, text),
        )
    except OSError:
        done = None
    if done is None or done.returncode != 0:
        _say("sbatch failed; this run cannot go on by itself after this job")
        return None
    follower = done.stdout.strip().split(";")[0]
    shutil.copyfile(folder / f"{job}_submitted.pkl", folder / f".{follower}.tmp")
    os.replace(folder / f".{follower}.tmp", folder / f"{follower}_submitted.pkl")
    script.replace(folder / f"{follower}_submission.sh")
    record(run, "submit", job=follower, by="follow-up", after=job, dependency=dependency)
    for child in _waiting_jobs(spec):
        # Queued beforehand, it is needed only if this job fails; else it alone counts.
        need = ("afterok:" + job + "?" if dependency.startswith("afternotok") else "") + "afterok:" + follower
        if not _done("scontrol", "update", "JobId=" + child, "Dependency=" + need):
            _say(f"job {child} still waits for {job} alone: submit that stage again, with --after this run")
    return follower


def _excluded(run: str, spec: dict[str, Any]) -> list[str]:
    """The profile's nodes to avoid, and those that failed twice since the run was submitted."""
    found = [node for e in since_submission(history(run)) for node in e.get("exclude", [])]
    return sorted({*expand(spec.get("exclude") or ""), *found})


def _waiting_jobs(spec: dict[str, Any]) -> list[str]:
    """Jobs of the chain's next stages that were queued behind this run."""
    waiting: list[str] = []
    for run in spec.get("dependents", []):
        jobs = [e["job"] for e in history(run) if e["event"] == "submit"]
        waiting += jobs[-1:]
    return waiting


def _next_job(run: str, job: str) -> str | None:
    return next(
        (e["job"] for e in reversed(history(run)) if e["event"] == "submit" and e.get("after") == job), None
    )


def _cancel_next(run: str, job: str) -> None:
    follower = _next_job(run, job)
    if follower:
        _done("scancel", follower)


def _exclude_from_next(run: str, spec: dict[str, Any], job: str, nodes: Sequence[str]) -> None:
    follower = _next_job(run, job)
    if follower is None:
        return
    if not _done("scontrol", "update", "JobId=" + follower, "ExcNodeList=" + ",".join(nodes)):
        _done("scancel", follower)
        _queue_next(run, spec, job, "afternotok:" + job, nodes)


def _done(*command: str) -> bool:
    """Run a command; False if it fails or is not there."""
    try:
        return subprocess.call(command) == 0
    except OSError:
        return False


def _what_happened(attempt: Event) -> str:
    """Which of an attempt's nodes are down, as far as sinfo knows."""
    names = ",".join(attempt.get("nodes") or [])
    try:
        rows = subprocess.run(
            ["sinfo", "-h", "-N", "-n", names, "-o", "%N %T"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, timeout=20,
        ).stdout.split("\n")  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        rows = []
    down = sorted({row.split()[0] for row in rows if re.search(r"down|fail|drain|not_responding|\*", row)})
    if down:
        return "{} went down".format(", ".join(down))
    return "cut off by Slurm on {} (a node failed, or the nodes were taken without notice)".format(
        names or "unknown nodes"
    )


def _slurm_state() -> str | None:
    try:
        shown = subprocess.run(
            ["scontrol", "show", "job", os.environ.get("SLURM_JOB_ID", "")], stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, timeout=20,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"JobState=(\w+)(?: Reason=(\w+))?", shown)
    if match is None:
        return None
    # A job that is being ended is COMPLETING, whatever for; sometimes the reason tells.
    return {"TimeLimit": "TIMEOUT", "NodeDown": "NODE_FAIL"}.get(match.group(2), match.group(1))


def _stderr(spec: dict[str, Any], job: str) -> str:
    """srun's own messages of this attempt. The file is appended to by every restart: begin() leaves a mark in it."""
    path = Path(spec["folder"]) / f"{job}_0_log.err"
    if not path.is_file():
        return ""
    return path.read_text(encoding="utf-8", errors="replace").rpartition(MARK)[2]


def _say(message: str) -> None:
    print("dattrain: " + message, file=sys.stderr, flush=True)


def _json(path: Path) -> Event | None:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def main(argv: Sequence[str]) -> int:
    """``begin RUN``, ``guard RUN`` or ``end RUN STATUS``."""
    if len(argv) == 2 and argv[0] in ("begin", "guard"):
        return begin(argv[1]) if argv[0] == "begin" else guard(argv[1])
    if len(argv) == 3 and argv[0] == "end":
        return end(argv[1], int(argv[2]))
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
