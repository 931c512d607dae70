"""Status of runs, from their history, Slurm and their metrics, as ``dattrain status`` shows it. Pure but for reading files."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from dattrain.clock import duration
from dattrain.config.load import load
from dattrain.engine import early_stopping, starts
from dattrain.files import shown
from dattrain.observe.metrics import parse as parse_rows
from dattrain.runtime import owner
from dattrain.submit import history, job_state, local, queue
from dattrain.submit.history import Event
from dattrain.submit.queue import UNKNOWN, JobState
from dattrain.text import columns


@dataclass(frozen=True)
class RunStatus:
    """One run. ``state`` is ours: ``finished``, ``running``, ``waiting``, ``stopped``, ``cancelled``, ``failed``, ``crashed``, ``unknown``."""

    run: Path
    state: str
    job: str | None
    slurm: JobState
    why: str
    """Reason of the state, where there is one to give."""
    step: int | None
    last_step: int | None
    epoch: float | None
    """Epochs of the training set done, as the log lines of the training have them."""
    images_per_s: float | None
    loss: float | None
    eta_s: float | None
    checkpoint: int | None
    top1: float | None
    """Of the newest evaluation, in percent."""
    restarts: tuple[str, ...]
    """Why each attempt but the last ended."""
    miou: float | None = None
    """Of a segmentation, in place of ``top1``."""
    warnings: tuple[str, ...] = ()
    """What keeps the run from resuming by itself after this attempt."""


def jobs_of(run: Path) -> list[str]:
    """Slurm jobs of a run that may still live; empty where the history alone has decided."""
    events = history.history(run)
    return _newest_jobs(events) if state_of(events, UNKNOWN)[0] == "unknown" else []


def _newest_jobs(events: Sequence[Event]) -> list[str]:
    """The newest two Slurm jobs: a follow-up waits behind the one that runs."""
    return [job for job in history.submitted_jobs(events) if not job.startswith("local")][-2:]


def active_job(run: Path) -> tuple[str | None, str]:
    """Job of a run that is not over, and its state; None and UNKNOWN where only Slurm could tell and does not answer."""
    events = history.history(run)
    if local.alive(run):
        return history.submitted_jobs(events)[-1], "RUNNING"
    states = queue.states(_newest_jobs(events))
    for job, state in states.items():
        if not state.final and state != UNKNOWN:
            return job, state.state
    unknown = UNKNOWN in states.values() and state_of(events, UNKNOWN)[0] == "unknown"
    return None, "UNKNOWN" if unknown else ""


def status_of(run: Path, states: Mapping[str, JobState], *, local_alive: bool = False) -> RunStatus:
    """Put the status of one run together."""
    events = history.history(run)
    job, slurm = _current(events, states)
    state, why = _by_hand(run, events) or state_of(events, slurm, local_alive=local_alive)
    if state == "failed" and not why and job is not None:
        why = why_failed(run, job, slurm)
    if state not in ("running", "waiting"):
        state, why = _without_job(run, state, why)
    metrics = read_metrics(run / "metrics.jsonl")
    if state == "finished" and not why:
        why = _stopped_early(run, metrics)
    ends = [e for e in history.since_submission(events) if e["event"] == "end" and e.get("action") == "again"]
    live = state == "running"
    return RunStatus(
        run=run,
        state=state,
        job=job,
        slurm=slurm,
        why=why,
        step=metrics.get("step"),
        last_step=_last_step(run, metrics),
        epoch=metrics.get("epoch"),
        images_per_s=metrics.get("images_per_s") if live else None,
        loss=metrics.get("loss"),
        eta_s=metrics.get("eta_s") if live else None,
        checkpoint=history.newest_checkpoint(run),
        top1=_evaluation(run, "top1") or metrics.get("top1"),
        miou=_evaluation(run, "miou") or metrics.get("miou"),
        restarts=tuple(_restart(e) for e in ends),
        warnings=tuple(text for text in _warnings(events) if text not in why),
    )


def _by_hand(run: Path, events: Sequence[Event]) -> tuple[str, str] | None:
    """State and reason of a run whose newest start was typed, after whatever was submitted; None where there is no such start.

    That it runs is for ``_without_job`` to see.
    """
    newest = next(reversed(starts.read(run)), None)
    if newest is None or newest.get("launcher") not in starts.BY_HAND:
        return None
    if events and starts.began(newest) < events[-1].get("time", 0):
        return None
    step = history.newest_checkpoint(run)
    again = f"dattrain train {quote(shown(run))} goes on" + ("" if step is None else f" from step {step}")
    end = newest.get("end")
    if end is None:
        return (
            "crashed",
            f"its process is gone without a word (killed, out of memory, or the machine went down); {again}",
        )
    if end["status"] == "finished":
        return "finished", ""
    if end["status"] == "failed":
        return "failed", f"{end['why']}; {again}"
    return "stopped", f"{'preempted: ' if end['status'] == 'preempted' else ''}{end['why']}; {again}"


def _without_job(run: Path, state: str, why: str) -> tuple[str, str]:
    """State and reason of a run that a process trains without a job of ours, or whose jobs are another folder's."""
    found = owner.current_owner(run)
    if found is not None and found[1] == "alive" and found[0].purpose == owner.TRAINED:
        return "running", f"trained by {found[0].who()}"
    if state == "crashed" and found is not None:  # its process cannot be seen from here
        return "unknown", f"{found[0].who()} has the folder, or had it when it died"
    reasons = [why, history.origin(run)]
    jobs = history.submitted_jobs(history.history(run))
    if found is not None and not (found[1] == "unknown" and found[0].job in jobs):
        reasons.append(f"{found[0].who()} has the folder, or had it when it died")
    return state, "; ".join(filter(None, reasons))


def state_of(events: Sequence[Event], slurm: JobState, *, local_alive: bool = False) -> tuple[str, str]:
    """State of a run and the reason for it; no reason for a failed run whose job recorded none.

    The history knows what our job decided; Slurm knows what became of it. An attempt that Slurm broke off
    (NODE_FAIL) is followed by another as long as Slurm keeps the job.
    """
    now = history.since_submission(events)
    if not now:
        return "not submitted", ""
    ends = [e for e in now if e["event"] == "end"]
    last = ends[-1] if ends else None
    begun = history.open_attempt(now) is not None
    if any(e["event"] == "cancel" for e in now):
        return "cancelled", "by dattrain cancel"
    if last is not None and not begun:
        if last["action"] == "done":
            return "finished", ""
        if last["action"] == "stop":
            state = {"stopped": "stopped", "cancelled": "cancelled"}.get(last["reason"], "failed")
            return state, last["why"]
    if local_alive:
        behind = now[0].get("behind")
        if behind and not begun and last is None:
            return "waiting", f"behind {shown(Path(behind))} on this machine"
        return "running", ""
    if str(now[0].get("job", "")).startswith("local"):
        return "failed", "its supervisor on the machine that started it is gone; see submit/local.log"
    name = slurm.state
    if name in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"):
        return "running", "suspended by Slurm" if name in ("SUSPENDED", "STOPPED") else ""
    if slurm.never_starts:
        return "cancelled", "the job that it waits for did not end well"
    if name in ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "REQUEUE_FED"):
        held = "held" in slurm.reason.lower()
        return "waiting", f"held ({slurm.reason}); scontrol release starts it" if held else slurm.reason
    if name in ("NODE_FAIL", "SPECIAL_EXIT"):
        return "waiting", f"{name}; Slurm has not started it again yet"
    if name == "CANCELLED":
        before = "before it started: cancelled by hand, or the job that it waited for did not end well"
        return "cancelled", before if not begun and last is None else "with scancel"
    if name == "UNKNOWN":
        return "unknown", "no answer from squeue, sacct or scontrol"
    left = _warnings(now)
    if left:
        how = f"{last['reason']}: {last['detail']}; " if last is not None and not begun else ""
        return "failed", f"{how}{'; '.join(left)}; submitted again, it resumes from its checkpoint"
    if name == "TIMEOUT":
        return "failed", "reached its time limit and was killed before it had saved"
    if name == "PREEMPTED":
        return "failed", (
            "preempted, and killed before it could queue another job (requeue: follow-up has one ready); "
            "submitted again, it resumes from its checkpoint"
        )
    return "failed", ""


MEANINGS = {
    "OUT_OF_MEMORY": "out of memory (mem_gb of the profile)",
    "BOOT_FAIL": "a node did not boot",
    "DEADLINE": "its deadline came first",
    "NODE_FAIL": "a node failed",
    "FORGOTTEN": "over, and Slurm has forgotten how it ended",
}
"""What Slurm's states mean where the job itself could say nothing."""


def why_failed(run: Path, job: str, slurm: JobState) -> str:
    """Reason of a failed job that recorded none: the last line of the batch script's error file, and what Slurm says."""
    code, reason = queue.exit_of(job)
    status, _, signum = code.partition(":")
    parts = [MEANINGS.get(slurm.state, slurm.state)]
    if signum not in ("", "0", "53"):
        parts.append(f"killed by signal {signum}")
    elif status not in ("", "0"):
        parts.append(f"exit code {status}")
    if reason and reason not in ("NonZeroExitCode", "JobLaunchFailure"):
        parts.append(reason)
    try:
        spec = history.read_spec(run)
    except (OSError, ValueError):
        return ", ".join(parts) + "; the run folder has no submit/spec.json any more"
    log = Path(spec["folder"]) / f"{job}_0_log.err"
    if line := job_state.last_error_of_rank(spec, job, 0):
        return f"{', '.join(parts)}: {line}"
    if signum == "53" or (reason == "JobLaunchFailure" and not log.exists()):
        return f"{', '.join(parts)}: Slurm could not open the job's log {log} (is the folder there, and seen by the node?)"
    return f"{', '.join(parts)}; {log} {'is empty' if log.exists() else 'is not there'}"


def _warnings(events: Sequence[Event]) -> list[str]:
    """Warnings of the newest attempt; a later one has overcome what the job hook could not."""
    found: list[str] = []
    for event in events:
        if event["event"] in ("begin", "submit"):
            found.clear()
        elif event["event"] == "warning":
            found.append(event["text"])
    return list(dict.fromkeys(found))


def _current(events: Sequence[Event], states: Mapping[str, JobState]) -> tuple[str | None, JobState]:
    """The job that counts: the newest that has begun or lives; a follow-up that only waits does not hide the one that runs."""
    jobs = history.submitted_jobs(history.since_submission(events))
    known = [(job, states.get(job, UNKNOWN)) for job in jobs]
    for job, state in reversed(known):
        if not state.final and state.state not in ("UNKNOWN", "PENDING"):
            return job, state
    for job, state in reversed(known):
        if state.state == "PENDING":
            return job, state
    begun = [e["job"] for e in events if e["event"] == "begin"]
    for job, state in reversed(known):
        if job in begun[-1:]:
            return job, state
    return known[-1] if known else (None, UNKNOWN)


def _restart(end: Event) -> str:
    step = end.get("checkpoint")
    left = "no checkpoint" if step is None else f"checkpoint of step {step}"
    when = time.strftime("%m-%d %H:%M", time.localtime(end["time"]))
    avoided = f"; without {', '.join(end['exclude'])} from now on" if end.get("exclude") else ""
    return f"{when}  {end['reason']}: {end['detail']}, {left}{avoided}"


def read_metrics(path: Path) -> dict[str, Any]:
    """Newest value of each metric, from the last 64 KiB of metrics.jsonl; empty when there is none yet."""
    found: dict[str, Any] = {}
    if path.is_file():
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 65536))
            text = file.read().decode(errors="replace")
        for row in parse_rows(text):
            found.update({key: value for key, value in row.items() if value is not None})
    return found


def _last_step(run: Path, metrics: Mapping[str, Any]) -> int | None:
    """All updates of the run as its newest start counted them; of older versions, by the recipe and the epoch that the metrics state."""
    newest = next(reversed(starts.read(run)), None)
    if newest is not None and isinstance(newest.get("last_step"), int):
        return int(newest["last_step"])
    if not (run / "config.yaml").is_file() or not metrics.get("epoch"):
        return None
    config = load(run / "config.yaml").config
    if config.schedule.updates is not None:
        return min(config.schedule.updates, config.train.max_steps or config.schedule.updates)
    per_epoch = metrics["samples"] / metrics["epoch"] / config.train.global_batch
    # The epoch is rounded to six digits, which is most at the start: an integer must not become the next one.
    exact = config.schedule.epochs * per_epoch
    total: int = math.ceil(exact * (1 - 1e-6 / metrics["epoch"]))
    return min(total, config.train.max_steps or total)


def _stopped_early(run: Path, metrics: Mapping[str, Any]) -> str:
    if early_stopping.WAITED not in metrics or not (run / "config.yaml").is_file():
        return ""
    if metrics.get("step") == _last_step(run, metrics):
        return ""
    return early_stopping.stopped_early(load(run / "config.yaml").config, metrics) or ""


def _evaluation(run: Path, metric: str) -> float | None:
    try:
        return float(json.loads((run / "evaluation.json").read_text(encoding="utf-8"))[metric])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def render(statuses: Sequence[RunStatus]) -> str:
    """A line for each run, and below it its restarts and the reason of its state."""
    kinds = {"TOP-1" if r.miou is None else "MIOU" for r in statuses}
    score = "/".join(sorted(kinds, reverse=True)) or "TOP-1"
    rows = [
        ("RUN", "STATE", "JOB", "STEP", "EPOCH", "IMAGES/S", "LOSS", "ETA", score, "CHECKPOINT", "RESTARTS")
    ]
    for r in statuses:
        step = "-" if r.step is None else f"{r.step}/{r.last_step}" if r.last_step else str(r.step)
        rows.append(
            (
                shown(r.run),
                r.state,
                f"{r.job or '-'}" + (f" {r.slurm.nodes}" if r.slurm.nodes and r.state == "running" else ""),
                step,
                "-" if r.epoch is None else f"{r.epoch:.2f}",
                "-" if r.images_per_s is None else f"{r.images_per_s:.1f}",
                "-" if r.loss is None else f"{r.loss:.4f}",
                "-" if r.eta_s is None else duration(r.eta_s),
                next((f"{value:.2f}" for value in (r.top1, r.miou) if value is not None), "-"),
                "-" if r.checkpoint is None else f"step {r.checkpoint}",
                str(len(r.restarts)),
            )
        )
    header, *table = columns(rows)
    lines = [header]
    for line, one in zip(table, statuses):
        lines.append(line)
        lines += [f"    {one.state}: {one.why}"] if one.why else []
        lines += [f"    warning: {text}" for text in one.warnings]
        lines += [f"    restart {n}: {text}" for n, text in enumerate(one.restarts, 1)]
    return "\n".join(lines)
