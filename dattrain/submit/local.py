"""``--cluster local``: the same job object through submitit's local executor, under a supervisor that outlives the shell.

The supervisor is to this machine what the batch script and its job hook are to a cluster: it keeps the same history,
ends all tasks when one dies (submitit's controller would wait for the others), and starts again by the same rules. The runs of
an array or a chain have one supervisor, which takes them in turn; signals to it:

- SIGTERM, SIGINT: save, end, and start none of the others;
- SIGUSR1: look whether the run whose turn it is has been cancelled (``dattrain cancel``), and go on with the next one then.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from dattrain.runtime.process import start_time
from dattrain.submit import history, job_state
from dattrain.submit.cluster import Profile
from dattrain.submit.job import Job

GRACE_S = 30.0
"""Seconds between asking tasks to end and ending them, as scancel has it."""
AGAIN_S = 5.0
"""Seconds after which they are asked again."""


def start(runs: Sequence[Path], profile: Profile) -> subprocess.Popen[bytes]:
    """Start the supervisor of prepared run folders in a session of its own; its job id is ``job_of`` it."""
    environment = {**os.environ, **profile.environment}
    code = str(runs[0] / "submit" / "code")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [code, environment.get("PYTHONPATH")]))
    python = profile.python or sys.executable
    enter = str(Path(code) / "dattrain" / "submit" / "enter.py")
    # A cancel may come before there is a handler; the history has it then.
    lines = [*profile.setup, "trap '' USR1", 'exec "$0" "$1" -u -m dattrain.submit.local "${@:2}"']
    with open(_log(runs[0]), "ab") as log:
        process = subprocess.Popen(
            ["bash", "-c", "\n".join(lines), python, enter, *map(str, runs)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
        )  # fmt: skip
    known = {"pid": process.pid, "start": start_time(process.pid), "host": socket.gethostname()}
    for number, run in enumerate(runs):
        (run / "submit" / "local.json").write_text(json.dumps(known))
        behind = {"behind": str(runs[number - 1])} if number else {}
        history.record(run, "submit", job=job_of(process), by="user", nodes="1", **behind)
    return process


def job_of(process: subprocess.Popen[bytes]) -> str:
    """``local-PID``."""
    return f"local-{process.pid}"


def alive(run: Path) -> bool:
    """Whether the run has a supervisor on this machine, and is not over for it: its turn may be still to come."""
    events = history.since_submission(history.history(run))
    if history.open_attempt(events) is None and (history.cancelled(events) or _decided(events)):
        return False
    return _supervisor(run) is not None


def cancel(run: Path) -> bool:
    """Have the supervisor end the run's tasks, or never start them, now that ``cancel`` is in the history.

    False if the run has no supervisor, or is over for it.
    """
    pid = _supervisor(run)
    if pid is None or _decided(history.since_submission(history.history(run))):
        return False
    # Another run's turn is not to end with this one's.
    os.kill(pid, signal.SIGUSR1)
    return True


def _supervisor(run: Path) -> int | None:
    try:
        known = json.loads((run / "submit" / "local.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    # A pid alone may have gone to another process since; and in a copied folder the supervisor is another run's.
    same = known["host"] == socket.gethostname() and start_time(known["pid"]) == known["start"]
    own = any(e.get("job") == f"local-{known['pid']}" for e in history.history(run) if e["event"] == "submit")
    return known["pid"] if same and own else None


def _decided(events: Sequence[history.Event]) -> bool:
    """Whether the last attempt has ended, and nothing follows it."""
    ends = [e["action"] for e in events if e["event"] == "end"]
    return bool(ends) and ends[-1] in ("done", "stop")


def _log(run: Path) -> Path:
    return run / "submit" / "local.log"


class _Terminated(BaseException):
    """SIGTERM or SIGINT reached the supervisor."""


class _Cancelled(_Terminated):
    """The run whose turn it is has been cancelled."""


def supervise(runs: Sequence[Path]) -> int:
    """Run the jobs of ``runs``, one after the other, each until it has finished or must not be started again.

    A run that another one waits for (the ``dependents`` of its spec.json) has to finish for that one to start.
    Returns 0 if all have finished.
    """
    turn: list[Path] = []

    def terminate(signum: int, frame: FrameType | None) -> None:
        raise _Terminated

    def look(signum: int, frame: FrameType | None) -> None:
        if turn and history.cancelled(history.history(turn[-1])):
            raise _Cancelled

    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGINT, terminate)
    signal.signal(signal.SIGUSR1, look)
    failed: list[Path] = []
    for number, run in enumerate(runs):
        with open(_log(run), "ab") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        needed = next((p for p in failed if str(run) in history.read_spec(p)["dependents"]), None)
        if needed is not None:
            _not_started(run, f"{needed.name} did not end well")
            failed.append(run)
            continue
        turn.append(run)
        try:
            done = not history.cancelled(history.history(run)) and _to_its_end(run)
        except _Cancelled:
            done = False
        except _Terminated:
            for later in runs[number:]:
                _not_started(later, "the supervisor was told to end")
            return 1
        finally:
            turn.clear()
        if not done:
            failed.append(run)
    return 1 if failed else 0


def _to_its_end(run: Path) -> bool:
    """Attempt a run until it has finished (True) or must not be started again."""
    spec = history.read_spec(run)
    action = "again"
    while action == "again":
        action = _attempt(run, spec)
    return action == "done"


def _not_started(run: Path, why: str) -> None:
    """Note that nothing will follow for a run, unless that is noted already."""
    events = history.since_submission(history.history(run))
    if history.cancelled(events) or _decided(events):
        return
    history.record(
        run, "end", job=events[0].get("job"), restart=0, reason="cancelled", detail=why, node=None,
        checkpoint=history.newest_checkpoint(run), new=False, action="stop", why=why,
    )  # fmt: skip


def _attempt(run: Path, spec: dict[str, Any]) -> str:
    from submitit.local.local import LocalExecutor

    enter = Path(__file__).with_name("enter.py")
    executor = LocalExecutor(spec["folder"], python=shlex.join([sys.executable, str(enter)]))
    executor.update_parameters(
        tasks_per_node=spec["tasks_per_node"],
        gpus_per_node=spec["profile"]["gpus_per_node"],
        timeout_min=spec["time_s"] / 60,
        signal_delay_s=spec["signal_delay_s"],
    )
    history.stalled_file(run).unlink(missing_ok=True)
    before = history.newest_checkpoint(run)
    job = executor.submit(Job(str(run), spec["action"]))
    begun = history.record(
        run, "begin", job=job.job_id, restart=0, nodes=[socket.gethostname()], checkpoint=before
    )
    try:
        if history.cancelled(history.history(run)):
            raise _Cancelled  # just before there was an attempt to be told so
        status = _wait(job, spec["tasks_per_node"], history.attempt_folder(run, job.job_id, 0))
    except _Terminated as told:
        _end_tasks(job)
        by = "by dattrain cancel" if isinstance(told, _Cancelled) else "the supervisor was told to end"
        history.record(
            run, "end", job=job.job_id, restart=0, reason="cancelled", detail=by, node=None,
            checkpoint=history.newest_checkpoint(run), new=False, action="stop", why=by,
        )  # fmt: skip
        raise
    ended = history.record_end(
        run, spec, begun, status=status, slurm_state=None, stderr="",
        last_error=partial(job_state.last_error_of_rank, spec, job.job_id), may_exclude=False,
    )  # fmt: skip
    print("dattrain: {reason}: {detail}; {action} ({why})".format(**ended), flush=True)
    return str(ended["action"])


def _wait(job: Any, world: int, folder: Path) -> int:
    """Wait for all tasks; when one dies, end the others after a moment for their own errors. 0 if all ended well."""
    ranks: dict[int, int] = {}
    failed_at: float | None = None
    while job._process.poll() is None:
        for pid in _children(job._process.pid):
            if pid not in ranks and (rank := _rank_of(pid)) is not None:
                ranks[pid] = rank
        living = {ranks[pid] for pid in list(ranks) if start_time(pid) is not None}
        gone = set(ranks.values()) - living
        dead = {r for r in gone if not _ended_well(job, r, folder)}
        if dead and failed_at is None:
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > 5 and living:
            for pid in [p for p, r in ranks.items() if r in living]:
                _kill(pid, signal.SIGKILL)
        time.sleep(0.2)
    return 0 if all(_ended_well(job, rank, folder) for rank in range(world)) else 1


def _ended_well(job: Any, rank: int, folder: Path) -> bool:
    result = Path(job.paths.folder) / f"{job.job_id}_{rank}_result.pkl"
    return result.exists() and not (folder / f"rank_{rank:05d}.json").exists()


def _end_tasks(job: Any) -> None:
    tasks = _children(job._process.pid)
    deadline = time.monotonic() + GRACE_S
    # Again and again: until a training has begun submitit's handler takes the signal, and does nothing.
    while time.monotonic() < deadline and any(start_time(pid) is not None for pid in tasks):
        for pid in tasks:
            _kill(pid, signal.SIGTERM)
        until = time.monotonic() + AGAIN_S
        while time.monotonic() < until and any(start_time(pid) is not None for pid in tasks):
            time.sleep(0.2)
    for pid in tasks:
        _kill(pid, signal.SIGKILL)
    job._process.wait(timeout=10)


def _children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _rank_of(pid: int) -> int | None:
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    value = next((w.partition(b"=")[2] for w in words if w.startswith(b"SUBMITIT_LOCAL_GLOBALID=")), None)
    return int(value) if value else None


def _kill(pid: int, signum: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, signum)


if __name__ == "__main__":
    sys.exit(supervise([Path(word) for word in sys.argv[1:]]))
