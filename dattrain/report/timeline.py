"""The attempts of a run and what happened in them, from what the training and its jobs wrote down. Pure.

A training says when it starts, saves, evaluates, rolls back and ends (``observe.events``); its jobs say when they begin, on which
nodes, and what ended them (``submit.history``). A process that was killed says nothing: another start follows it, or its job knows.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Event = Mapping[str, Any]

KILLED = "killed"
"""How an attempt ended that wrote down no end, and is over."""
_MARKS = ("evaluation", "save", "skipped", "rollback", "resize", "warning")
_SAME_S = 120.0
"""A start in ``env.json`` and one in ``events.jsonl`` within so many seconds are one: between them models are built."""


@dataclass
class Attempt:
    """One start to its end; times in seconds since 1970, None where nobody knows."""

    start: float
    last: float
    """When the last thing was heard of it."""
    end: float | None = None
    how: str = ""
    """``finished``, ``preempted``, ``stopped``, ``failed``, ``killed``, or a job's reason; empty while it goes on."""
    why: str = ""
    first_step: int | None = None
    last_step: int | None = None
    nodes: list[str] = field(default_factory=list)
    world: int | None = None
    device: str = ""
    job: str | None = None
    began: bool = False
    """The training itself has started, not just its job."""
    marks: list[dict[str, Any]] = field(default_factory=list)
    """Events within it: time, event, step, text."""


def attempts(
    events: Sequence[Event], jobs: Sequence[Event] = (), starts: Sequence[Event] = (), *, alive: bool = False
) -> list[dict[str, Any]]:
    """Attempts of a run, oldest first, as JSON.

    Args:
        events: of ``observe.events.read``.
        jobs: of ``submit.history.history``.
        starts: of ``env.json``, where an older version has trained, which wrote no events.
        alive: the run is being trained now.
    """
    found: list[Attempt] = []
    for event in _merged(events, jobs, starts):
        now, kind = float(event["time"]), event["event"]
        current = found[-1] if found else None
        open_one = current if current is not None and current.end is None else None
        if kind == "begin":
            _close(open_one)
            found.append(
                Attempt(now, now, nodes=list(event.get("nodes") or ()), job=_text(event.get("job")), first_step=event.get("checkpoint"))
            )  # fmt: skip
        elif kind == "start":
            if open_one is None or open_one.began:
                _close(open_one)
                open_one = Attempt(now, now)
                found.append(open_one)
            open_one.began, open_one.last = True, now
            open_one.first_step = open_one.last_step = event.get("step")
            open_one.nodes = list(event.get("nodes") or open_one.nodes)
            open_one.world, open_one.device = event.get("world"), str(event.get("device") or "")
            open_one.job = open_one.job or _text(event.get("job"))
        elif kind == "end" and "status" in event:
            if open_one is not None:
                open_one.how, open_one.why = event["status"], event.get("error", "")
                open_one.last = open_one.end = now
                open_one.last_step = event.get("step", open_one.last_step)
        elif kind == "end":
            # The job's word comes after the training's, and knows more: a time limit, a node that went down.
            if current is not None and not (current.end is not None and current.job is None):
                current.how = event.get("reason") or current.how
                node = f" on {event['node']}" if event.get("node") else ""
                current.why = f"{event.get('detail') or current.why}{node}"
                current.last = current.end = current.end or now
        elif kind in _MARKS and open_one is not None:
            open_one.last = now
            step = event.get("step")
            open_one.last_step = step if isinstance(step, int) else open_one.last_step
            open_one.marks.append({"time": now, "event": kind, "step": step, "text": _said(event)})
    if not alive:
        _close(found[-1] if found else None)
    return [asdict(each) for each in found]


def restarts(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Steps of a run's curves at which an attempt went on from a checkpoint or rolled back: step, text."""
    marks = [
        {
            "step": each["first_step"],
            "text": "restart" + (f" after: {before['how']}" if before["how"] else ""),
        }
        for before, each in itertools.pairwise(found)
        if each["first_step"]
    ]
    marks += [
        {"step": mark["step"], "text": mark["text"]}
        for each in found
        for mark in each["marks"]
        if mark["event"] in ("rollback", "resize")
    ]
    return sorted(marks, key=lambda mark: mark["step"])


def trained_s(found: Sequence[Mapping[str, Any]]) -> float:
    """Seconds that the attempts took together, as far as they were heard of."""
    return float(sum((each["end"] or each["last"]) - each["start"] for each in found))


def _merged(events: Sequence[Event], jobs: Sequence[Event], starts: Sequence[Event]) -> list[Event]:
    first = min((e["time"] for e in events if e["event"] == "start"), default=float("inf"))
    older = []
    for start in starts:
        when = _seconds(start.get("time"))
        if when is not None and when < first - _SAME_S:
            older.append({**start, "time": when, "event": "start", "nodes": [start["host"]] if start.get("host") else [], "job": start.get("slurm_job")})  # fmt: skip
    kinds = ("begin", "end", "warning")
    own = [e for e in jobs if e.get("event") in kinds and isinstance(e.get("time"), (int, float))]
    return sorted([*older, *events, *own], key=lambda e: float(e["time"]))


def _close(attempt: Attempt | None) -> None:
    if attempt is not None and attempt.end is None:
        attempt.end, attempt.how = attempt.last, KILLED
        attempt.why = "it wrote down no end"


def _said(event: Event) -> str:
    kind, step = event["event"], event.get("step")
    if kind == "warning":
        return str(event.get("text"))
    return {
        "evaluation": f"evaluation at step {step}",
        "save": f"checkpoint of step {step}",
        "skipped": f"update {step} skipped: not finite",
        "rollback": f"rolled back at step {step} to the weights of step {event.get('to')}",
        "resize": f"from step {step} on at {event.get('img_size')} px",
    }[str(kind)]


def _seconds(text: Any) -> float | None:
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError):
        return None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
