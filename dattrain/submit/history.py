"""The history of a run's jobs, and what follows from it: what ended an attempt, and whether there is another.

Standard library alone, Python >= 3.8, since the job hook (``dattrain.submit.job_hook``) runs this on the
host. ``RUN/submit/history.jsonl`` has one line per event:

- ``submit``: job, run (the folder, absolute), after (the job that it follows), by (``user`` or ``follow-up``);
- ``begin``: job, restart (Slurm's count), nodes (names), checkpoint (step of the newest published one, or null);
- ``end``: job, restart, reason, detail, node (where a crash began), checkpoint, new (whether this attempt published
  one), action (of ``decide``; ``over`` for one of an earlier submission without a recorded end), why;
- ``warning``: job, text: what keeps the run from resuming by itself, such as an sbatch that refuses;
- ``cancel``: by ``dattrain cancel``.

A run folder may be copied or moved, and its history with it: jobs are those of the folder that they were submitted in, and
what another folder's jobs did is not part of ``history``.

``classify`` and ``decide`` are pure.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import time
from pathlib import Path
from typing import Any, Callable, Dict, Sequence  # noqa: UP035 (Python 3.8 runs this file)

Event = Dict[str, Any]  # noqa: UP006

SIGNALLED = ("User defined signal 1", "User defined signal 2")
"""srun's messages of a task that was ended by a signal which asks for a save: it came before the handler was set."""

NODE_FAILURE = "node failure"
"""A job that vanished without an end: a node went down, or Slurm took the nodes without notice."""

CRASHES = ("crashed", "stalled")
"""Reasons that are forgiven ``--retries`` times."""

EARLY_S = 65
"""Slurm sends the signal of the time limit up to a minute earlier than it was asked to."""


def history(run: str | Path) -> list[Event]:
    """Events of a run's own jobs, oldest first; a line cut off by a power cut is skipped."""
    events, folders = _events(run)
    foreign = [n for n, folder in enumerate(folders) if folder is not None and not _same_folder(folder, run)]
    if not foreign:
        return events
    own = (n for n, folder in enumerate(folders) if folder is not None and n > foreign[-1])
    return events[next(own, len(events)) :]


def origin(run: str | Path) -> str | None:
    """The folder whose jobs a copied or moved one remembers, as text; None for a run that has jobs of its own."""
    _, folders = _events(run)
    last = next((folder for folder in reversed(folders) if folder is not None), None)
    if last is None or _same_folder(last, run):
        return None
    how = "a copy of" if os.path.isdir(last) else "moved from"
    return f"{how} {last}: the jobs submitted there are not this folder's"


def _events(run: str | Path) -> tuple[list[Event], list[str | None]]:
    """All that is written down, and for each submission the folder that it was made in."""
    path = Path(run) / "submit" / "history.jsonl"
    events = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                events.append(json.loads(line))
    # Before each submission said where it was made, only the newest could tell, by its spec.json.
    older = "" if any(event.get("run") for event in events) else _folder_of_spec(run)
    folders = [event.get("run", older) if event.get("event") == "submit" else None for event in events]
    return events, folders


def _folder_of_spec(run: str | Path) -> str:
    try:
        folder = Path(read_spec(run)["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return str(run)
    # RUN/submit/slurm; of an array, PARENT/submit/slurm.
    folder, here = folder.parent.parent, Path(os.path.realpath(run))
    return str(here if _same_folder(folder, here) or _same_folder(folder, here.parent) else folder)


def _same_folder(folder: str | Path, run: str | Path) -> bool:
    try:
        return os.path.samefile(folder, run)
    except OSError:
        return False


def submitted_jobs(events: Sequence[Event]) -> list[str]:
    """Jobs of the submissions among ``events``, in order."""
    return [event["job"] for event in events if event["event"] == "submit"]


def record(run: str | Path, event: str, **fields: Any) -> Event:
    """Append one event, complete and flushed to the disk."""
    path = Path(run) / "submit" / "history.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"time": round(time.time(), 3), "event": event, **fields}
    if event == "submit":
        entry["run"] = os.path.realpath(run)
    with open(path, "a+b") as file:
        # A line that a power cut left without its end must not swallow this one.
        file.seek(0, os.SEEK_END)
        torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return entry


def newest_checkpoint(run: str | Path) -> int | None:
    """Step of the newest published checkpoint, or None. Published means that its manifest exists."""
    steps = [
        int(manifest.parent.name[len("step_") :])
        for manifest in Path(run).glob("checkpoints/step_*/manifest.json")
        if manifest.parent.name[len("step_") :].isdigit()
    ]
    return max(steps, default=None)


def first_failure(stderr: str) -> tuple[str | None, str | None, int]:
    """Node, cause and rank of the first task that srun saw die, from srun's messages; (None, None, 0) if there is none.

    srun alone sees all tasks in one order. A task that is killed makes its neighbours fail a moment later, each with an
    error of its own, so neither the loudest traceback nor the earliest clock is to be believed.
    """
    match = re.search(r"^srun: error: ([^\s:]+): tasks? \[?(\d+)[\d,\-\[\]]*: (.+)$", stderr, re.MULTILINE)
    return (match.group(1), match.group(3).strip(), int(match.group(2))) if match else (None, None, 0)


def classify(
    *,
    status: int,
    outcome: Event | None,
    slurm_state: str | None,
    elapsed_s: float,
    time_s: float,
    signal_delay_s: float,
    stderr: str,
    reports: Sequence[Event],
    stalled: Event | None = None,
    last_error: Callable[[int], str] = lambda rank: "",
) -> tuple[str, str, str | None]:
    """What ended an attempt: (reason, detail, node).

    Args:
        status: exit status of srun.
        outcome: what rank 0 wrote when training returned: ``{"status": ..., "step": ...}``, or None.
        slurm_state: Slurm's state of the job at the end (``dattrain.submit.job_state``), or None where nobody knows it.
        elapsed_s, time_s, signal_delay_s: age of the attempt, its limit, and how early the signal comes, in seconds.
        stderr: what srun printed in this attempt.
        reports: errors that ranks wrote before they died: ``{"rank", "node", "error", "user_error", "held"}``; held: another
            process has the run folder.
        stalled: what the first rank that noticed a stall wrote: ``{"rank", "host", "place", "silent_s"}``, or None.
        last_error: last line of what a rank printed; asked where nothing better is known.
    """
    state = slurm_state or ""
    at_limit = state == "TIMEOUT" or (time_s and elapsed_s >= time_s - signal_delay_s - EARLY_S)
    said = (outcome or {}).get("status")
    where = " at step {}".format(outcome["step"]) if outcome and outcome.get("step") is not None else ""
    saved = "saved" + where if where else "before training had begun"
    if said == "finished" and status == 0:
        return "finished", "finished" + where, None
    if said == "stopped":
        return "stopped", "stopped by hand" + where, None
    lost = re.search(r"^srun: error: Node failure on (\S+)", stderr, re.MULTILINE)
    if state == "NODE_FAIL" or lost or "DUE TO NODE FAILURE" in stderr:
        # Before COMPLETING is looked at: so Slurm says too while it takes the job off the nodes that are left.
        which = f"{lost.group(1)} went down" if lost else "Slurm lost a node"
        return NODE_FAILURE, which + where, None
    if state in ("PREEMPTED", "PREEMPTING", "REQUEUED"):
        reason = "requeued" if state == "REQUEUED" else "preempted"
        return reason, saved if said == "preempted" else "ended by Slurm before it had saved", None
    if state.startswith("CANCELLED") or state == "COMPLETING":
        # Slurm is ending the job, and nobody says why: somebody's scancel.
        return "cancelled", "ended from outside, as scancel does" + where, None
    if said == "preempted":
        return ("time limit" if at_limit else "preempted"), saved, None
    if state == "TIMEOUT":
        detail = "killed before it had saved; signal_delay_s is too short for a step and a save"
        return "time limit", detail, None
    if stalled is not None:
        # Ranks that wait for one another are silent together: the first to notice is not to blame.
        where = "rank {} on {} was silent for {} s in {!r}"
        return "stalled", where.format(*map(stalled.get, ("rank", "host", "silent_s", "place"))), None
    node, cause, rank = first_failure(stderr)
    if cause in SIGNALLED:
        return "preempted", f"{cause}, before training had begun", None
    report = next((r for r in reports if r.get("node") == node), reports[0] if reports else None)
    folder_taken = next((r for r in reports if r.get("held")), None)
    if folder_taken is not None:
        return "refused", folder_taken["error"], None
    if report is not None and report.get("user_error"):
        # All ranks met it: no node is to blame.
        return "crashed", report["error"], None
    # A rank that was killed writes no error: that of another rank of its node would be about the broken connection.
    exited = cause is None or cause.startswith("Exited with exit code")
    if report is not None and exited and (node is None or report.get("node") == node):
        cause, node = report["error"], report.get("node", node)
    if state == "OUT_OF_MEMORY" or (
        (exited or cause == "Killed") and re.search(r"oom.kill", stderr, re.IGNORECASE)
    ):
        cause = "out of memory (mem_gb of the profile): " + (cause or "Slurm ended the job")
    if exited and report is None:
        # It died before our code ran: Python is missing, too old, or lacks a module; srun could not start it.
        cause = ": ".join(filter(None, (cause or f"the tasks ended with status {status}", last_error(rank))))
    return "crashed", cause or f"the tasks ended with status {status}", node


def decide(events: Sequence[Event], *, retries: int, checkpoint_new: bool) -> tuple[str, str, list[str]]:
    """What follows an attempt that ended: (action, why, nodes to exclude). Pure.

    Args:
        events: the history; the last one is the attempt's ``end``, its action not yet filled in.
        retries: crashes that are forgiven per submission by hand.
        checkpoint_new: whether the attempt published a checkpoint.

    Actions: ``done``, ``stop``, ``again``. A preemption, like an administrator's requeue, is the cluster's doing and the run
    always resumes. After a crash, or an attempt that the time limit ended, it resumes only if it left a new checkpoint: what
    cannot make one step in a whole job never will.
    """
    last = events[-1]
    reason = last["reason"]
    ends = [e for e in since_submission(events) if e["event"] == "end" and e.get("action") != "over"]
    if reason == "finished":
        return "done", "finished", []
    if cancelled(events):
        return "stop", "cancelled by dattrain cancel", []
    if reason in ("stopped", "cancelled", "refused"):
        return "stop", last["detail"], []
    if reason in ("preempted", "requeued"):
        return "again", reason, []
    if not checkpoint_new:
        if reason == NODE_FAILURE:
            fruitless = itertools.takewhile(
                lambda end: end["reason"] == NODE_FAILURE and not end.get("new"), reversed(ends)
            )
            row = len(list(fruitless))
            if row <= retries:
                return "again", f"node failure {row} of {retries} in a row without a new checkpoint", []
            return "stop", f"{row} node failures in a row without a new checkpoint", []
        past = {"time limit": "reached its time limit"}.get(reason, reason)
        return "stop", f"{past} without having published a new checkpoint: {last['detail']}", []
    if reason in ("time limit", NODE_FAILURE):
        return "again", reason, []
    crashes = [e for e in ends if e["reason"] in CRASHES]
    if len(crashes) > retries:
        return "stop", f"crashed {len(crashes)} times, and --retries is {retries}: {last['detail']}", []
    named = [str(e["node"]) for e in crashes if e.get("node")]
    bad = sorted({node for node in named if named.count(node) >= 2})
    return "again", f"crash {len(crashes)} of {retries} that are forgiven", bad


def since_submission(events: Sequence[Event]) -> list[Event]:
    """What happened since the run was last submitted by hand; the retries of a submission start anew with it."""
    hand = [n for n, e in enumerate(events) if e["event"] == "submit" and e.get("by") == "user"]
    return list(events[hand[-1] if hand else 0 :])


def cancelled(events: Sequence[Event]) -> bool:
    """Whether ``dattrain cancel`` came after the last submission by hand."""
    return any(e["event"] == "cancel" for e in since_submission(events))


def read_spec(run: str | Path) -> dict[str, Any]:
    """``submit/spec.json``: what the submission fixed (see ``dattrain.submit.submission``)."""
    return dict(json.loads((Path(run) / "submit" / "spec.json").read_text(encoding="utf-8")))


def this_attempt() -> tuple[str, int]:
    """This Slurm job as squeue and submitit name it (``123``, or ``123_4`` within an array), and how often it was requeued."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    return job, int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def attempt_folder(run: str | Path, job: str, restart: int) -> Path:
    """Where the ranks of one attempt leave their outcome and errors."""
    return Path(run) / "submit" / "attempts" / f"{job}.{restart}"


def outcome_of(run: str | Path, job: str, restart: int) -> Event | None:
    """What rank 0 of an attempt wrote when training returned, or None."""
    return _json(attempt_folder(run, job, restart) / "outcome.json")


def stalled_file(run: str | Path) -> Path:
    """File of the first rank that notices a stall (``dattrain.runtime.health``); an attempt begins by removing an older one."""
    return Path(run) / "logs" / "stalled.json"


def record_end(
    run: str | Path,
    spec: dict[str, Any],
    begun: Event,
    *,
    status: int,
    slurm_state: str | None,
    stderr: str,
    last_error: Callable[[int], str],
    may_exclude: bool,
) -> Event:
    """Record how the attempt ``begun`` ended just now, by what its ranks left behind, and what follows; returns the ``end``.

    Args:
        status, slurm_state, stderr, last_error: as for ``classify``.
        may_exclude: whether a job can be kept off nodes.
    """
    job, restart = begun["job"], begun["restart"]
    found = map(_json, sorted(attempt_folder(run, job, restart).glob("rank_*.json")))
    reports = sorted((report for report in found if report), key=lambda report: report.get("time", 0))
    reason, detail, node = classify(
        status=status, outcome=outcome_of(run, job, restart), slurm_state=slurm_state,
        elapsed_s=time.time() - begun["time"], time_s=spec["time_s"], signal_delay_s=spec["signal_delay_s"], stderr=stderr,
        reports=reports, stalled=_json(stalled_file(run)), last_error=last_error,
    )  # fmt: skip
    now = newest_checkpoint(run)
    end: Event = {"reason": reason, "detail": detail, "node": node, "checkpoint": now}
    end["new"] = now is not None and now != begun["checkpoint"]
    action, why, bad = decide(
        [*history(run), {"event": "end", **end}], retries=spec["retries"], checkpoint_new=end["new"]
    )
    excluded = {"exclude": bad} if bad and may_exclude else {}
    return record(run, "end", job=job, restart=restart, **end, action=action, why=why, **excluded)


def _json(path: Path) -> Event | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def open_attempt(events: Sequence[Event]) -> Event | None:
    """The last attempt, if it has no end."""
    for event in reversed(events):
        if event["event"] == "end":
            return None
        if event["event"] == "begin":
            return event
    return None


def expand(nodelist: str) -> list[str]:
    """Names of a Slurm node list (``n[1-3,07],login``). ``scontrol show hostnames`` does it too, where it is."""
    names: list[str] = []
    for part in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*", nodelist):
        stack = [""]
        for literal, body in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", part):
            if literal:
                stack = [s + literal for s in stack]
                continue
            pieces = []
            for item in body.split(","):
                low, dash, high = item.partition("-")
                pieces += [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)] if dash else [low]
            stack = [s + piece for s in stack for piece in pieces]
        names += stack
    return names
