"""The job hook: before and after the tasks of each job, it writes down what happened and does what is next.

It runs on the host of the batch script with any Python >= 3.8 and the standard library alone, from the snapshot, so that
neither a container nor a broken environment of the tasks can keep a run from resuming::

    python3 enter.py -m dattrain.submit.job_hook begin RUN        # before srun; a status other than 0 ends the job there
    python3 enter.py -m dattrain.submit.job_hook guard RUN        # beside srun; requeues a job whose save outran its time limit
    python3 enter.py -m dattrain.submit.job_hook end RUN STATUS   # after srun, with its exit status; requeues, or lets the next one start

What it writes and how it decides is in ``dattrain.submit.history``, how it queues the next job in ``dattrain.submit.follow_up``.
Not here: the signal and the save (``dattrain.runtime.signals``, ``dattrain.engine.train``), and the first submission
(``dattrain.submit.submission``).
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import sys
import time
from typing import Any, Sequence  # noqa: UP035 (Python 3.8 runs this file)

from dattrain.errors import REQUEUE
from dattrain.submit import command, follow_up, job_state
from dattrain.submit.history import (
    CRASHES,
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
    outcome_of,
    read_spec,
    record,
    record_end,
    since_submission,
    stalled_file,
    this_attempt,
)

# Exit statuses of a batch script. Slurm shows them; afterok and afternotok see zero or not.
DONE, STOPPED, AGAIN, BROKEN = 0, 3, REQUEUE, 1

SUBMISSION_S = 60.0
"""Seconds that a job waits for word of its submission; submitit waits as long for its pickle."""

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What reaches the whole batch script, job hook included, while Slurm ends its job or a user signals it."""


def begin(run: str) -> int:
    """Record the end of an attempt that vanished, and the begin of this one. Returns the exit status of the batch script; 0: may start."""
    spec, (job, restart) = read_spec(run), this_attempt()
    events = _submitted(run, job)
    if cancelled(events):
        follow_up.say("not started: cancelled by dattrain cancel")
        return BROKEN
    if any(e.get("action") == "done" for e in since_submission(events)):
        # A job too many: queued for an attempt that Slurm then started again by itself.
        follow_up.say("not started: the run has finished")
        return BROKEN
    vanished = open_attempt(events)
    now = newest_checkpoint(run)
    if (
        vanished is not None
        and vanished["job"] != job
        and job_state.scontrol_state(vanished["job"]) in ("RUNNING", "SUSPENDED")
    ):
        follow_up.say("not started: job {} trains in this run folder".format(vanished["job"]))
        return BROKEN
    if vanished is not None:
        reason, detail = _what_happened(run, spec, vanished, same=vanished["job"] == job)
        new = now is not None and now != vanished.get("checkpoint")
        end_event = {"event": "end", "reason": reason, "detail": detail, "new": new}
        action, why, _ = decide([*events, end_event], retries=spec["retries"], checkpoint_new=new)
        if vanished not in since_submission(events):
            # Whoever submitted it again since has decided what follows.
            action, why = "over", "submitted again"
        record(
            run, "end", job=vanished["job"], restart=vanished["restart"], reason=reason, detail=detail,
            node=None, checkpoint=now, new=new, action=action, why=why,
        )  # fmt: skip
        if action == "stop":
            follow_up.say("not started again: " + why)
            return BROKEN
    nodes = expand(os.environ.get("SLURM_JOB_NODELIST", ""))
    record(run, "begin", job=job, restart=restart, nodes=nodes, checkpoint=now)
    attempt_folder(run, job, restart).mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        stalled_file(run).unlink()
    follow_up.say(
        job_state.ATTEMPT_MARK[len("dattrain: ") :]
        + "{}: {}".format(",".join(nodes), f"from step {now}" if now is not None else "from the start")
    )
    if spec["requeue"] == "follow-up" and follow_up.find(run, job) is None:
        follow_up.submit(run, spec, job, "afternotok:" + job, follow_up.excluded_nodes(run, spec))
    return 0


def _submitted(run: str, job: str) -> list[Event]:
    """The history, once this job's submission is in it: Slurm may start a job before whoever called sbatch has written that down."""
    deadline = time.monotonic() + SUBMISSION_S
    while True:
        events = history(run)
        if any(e["event"] == "submit" and e["job"] == job for e in events) or time.monotonic() > deadline:
            return events
        time.sleep(0.2)


def end(run: str, status: int) -> int:
    """Write down how the attempt ended and act on it. Returns the exit status of the batch script."""
    _end_guard()
    spec, (job, restart) = read_spec(run), this_attempt()
    started = open_attempt(history(run))
    if started is None or (started["job"], started["restart"]) != (job, restart):
        # The guard came first; or Slurm has long started another, since it had lost sight of this node.
        return AGAIN
    state, by_slurm = job_state.query(
        os.environ["SLURM_JOB_ID"], restart, functools.partial(job_state.stderr_of, spec, job)
    )
    ended = record_end(
        run, spec, started, status=status, slurm_state=state, stderr=job_state.stderr_of(spec, job),
        last_error=functools.partial(job_state.last_error_of_rank, spec, job), may_exclude=True,
    )  # fmt: skip
    action, why, reason = ended["action"], ended["why"], ended["reason"]
    follows = {"again": f"resumes ({why})", "done": "done"}.get(action, f"ends: {why}")
    follow_up.say("{}: {}; {}".format(reason, ended["detail"], follows))
    if action == "done":
        return DONE
    if action == "stop":
        if spec["requeue"] == "follow-up":
            follow_up.cancel(run, job)
        return STOPPED if reason == "stopped" else BROKEN
    excluded = follow_up.excluded_nodes(run, spec)
    if spec["requeue"] == "follow-up" and follow_up.find(run, job) is not None:
        if ended.get("exclude"):
            follow_up.exclude_nodes(run, spec, job, excluded)
        return AGAIN
    if by_slurm or (reason == NODE_FAILURE and spec["requeue"] == "scontrol"):
        # Slurm requeues it by itself.
        return AGAIN
    # After a crash, and where Slurm is ending the job, rather not the same job again: what Slurm was told about ending its
    # step may be told once more a minute later, when a busy node did not answer in time, and would end the new attempt,
    # whose step has the same number. Nor can the nodes of a job that runs be narrowed. The new job waits until the old one
    # has let go of everything.
    same = spec["requeue"] == "scontrol" and reason not in CRASHES and state not in ("TIMEOUT", "PREEMPTED")
    if same and _requeue(run, job, excluded):
        return AGAIN
    if not follow_up.submit(run, spec, job, "afterany:" + job, excluded) and not same:
        _requeue(run, job, excluded)
    return AGAIN


def _requeue(run: str, job: str, exclude: Sequence[str]) -> bool:
    """Call scontrol requeue, which kills this script; returns if it is refused."""
    # What is still said about the step that ended would be said about that of the new attempt.
    deadline = time.monotonic() + 60
    while re.search(r"\.\d+\s*$", command.output("squeue", "-h", "-s", "-j", job, "-o", "%i"), re.MULTILINE):
        if time.monotonic() > deadline:
            break
        time.sleep(1)
    refused = command.run("scontrol", "requeue", job)
    if refused is not None:
        # Allowed to the owner of a job that was submitted with --no-requeue.
        command.run("scontrol", "update", "JobId=" + job, "Requeue=1")
        refused = command.run("scontrol", "requeue", job)
    if refused is not None:
        follow_up.warn(run, job, "not requeued: scontrol said: " + refused)
        return False
    if exclude:
        command.run("scontrol", "update", "JobId=" + job, "ExcNodeList=" + ",".join(exclude))
    # Slurm now kills this script; waiting for that keeps the job from being seen as ended.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    time.sleep(60)
    return True


def guard(run: str) -> int:
    """Wait beside srun; returns an exit status.

    A job told to end by its time limit, or preempted, has KillWait seconds; what has not saved by then is
    resumed through here, since this script and srun are killed together. ``end`` ends this process.
    """
    signalled: list[float] = []
    signal.signal(signal.SIGTERM, lambda *_: signalled.append(time.monotonic()))
    # Bash reports a job that a signal has killed, and not one that ends by itself.
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
    spec, (job, restart) = read_spec(run), this_attempt()
    save_s = max(1.0, _kill_wait() - 4)
    while True:
        time.sleep(0.5)
        if not signalled:
            continue
        if open_attempt(history(run)) is None:
            return 0
        if time.monotonic() < signalled[-1] + save_s:
            continue
        found = job_state.query(
            os.environ["SLURM_JOB_ID"], restart, functools.partial(job_state.stderr_of, spec, job), 0
        )
        if found.state in ("TIMEOUT", "PREEMPTED", "REQUEUED"):
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            return end(run, 1)
        # The beginning of a grace period, or a signal by hand: the job lives on.
        signalled.clear()


def _end_guard() -> None:
    """The guard, if it is at work itself, is waited for."""
    pid = int(os.environ.get("DATTRAIN_GUARD") or os.getpid())
    if pid == os.getpid():
        return
    deadline = time.monotonic() + 20
    with contextlib.suppress(OSError):
        while time.monotonic() < deadline:
            os.kill(pid, signal.SIGUSR1)
            time.sleep(0.05)


def _kill_wait() -> float:
    match = re.search(r"KillWait\s*=\s*(\d+)", command.output("scontrol", "show", "config"))
    return float(match.group(1)) if match else 30.0


def _what_happened(run: str, spec: dict[str, Any], attempt: Event, same: bool) -> tuple[str, str]:
    """Reason and detail of an attempt without a recorded end: Slurm's state, else a node failure. ``same``: Slurm started its job again."""
    job = attempt["job"]
    state = job_state.query_ended(job, job_state.stderr_of(spec, job)).state
    if state in ("PREEMPTED", "REQUEUED", "TIMEOUT", "OUT_OF_MEMORY") or (state == "CANCELLED" and not same):
        reason, detail, _ = classify(
            status=1, outcome=outcome_of(run, job, attempt["restart"]), slurm_state=state,
            elapsed_s=0, time_s=0, signal_delay_s=0, stderr="", reports=[],
        )  # fmt: skip
        return reason, detail
    nodes = attempt.get("nodes") or []
    down = job_state.down_nodes(nodes)
    if down:
        return NODE_FAILURE, "{} went down".format(", ".join(down))
    return (
        NODE_FAILURE,
        "cut off by Slurm on {} (a node failed, or the nodes were taken without notice)".format(
            ",".join(nodes) or "unknown nodes"
        ),
    )


def main(argv: Sequence[str]) -> int:
    """``begin RUN``, ``guard RUN`` or ``end RUN STATUS``."""
    if len(argv) == 2 and argv[0] in ("begin", "guard"):
        return begin(argv[1]) if argv[0] == "begin" else guard(argv[1])
    if len(argv) == 3 and argv[0] == "end":
        # What ends the job must not keep its end from being recorded; the programs that are started from here inherit it.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        return end(argv[1], int(argv[2]))
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
