"""``--cluster local``: the same job object through submitit's local executor, under a supervisor that outlives the shell.

The supervisor is to this machine what the batch script and its job hook are to a cluster: it keeps the same history,
ends all tasks when one dies (submitit's controller would wait for the others), and starts again by the same rules.
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


def start(run: Path, profile: Profile) -> str:
    """Start the supervisor of a prepared run folder in a session of its own; returns its job id, ``local-PID``."""
    environment = {**os.environ, **profile.environment}
    code = str(run / "submit" / "code")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [code, environment.get("PYTHONPATH")]))
    python = profile.python or sys.executable
    enter = str(Path(code) / "dattrain" / "submit" / "enter.py")
    lines = [*profile.setup, 'exec "$0" "$1" -u -m dattrain.submit.local "$2"']
    with open(run / "submit" / "local.log", "ab") as log:
        process = subprocess.Popen(
            ["bash", "-c", "\n".join(lines), python, enter, str(run)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
        )  # fmt: skip
    job = f"local-{process.pid}"
    (run / "submit" / "local.json").write_text(
        json.dumps({"pid": process.pid, "start": start_time(process.pid), "host": socket.gethostname()})
    )
    history.record(run, "submit", job=job, by="user", nodes="1")
    return job


def alive(run: Path) -> bool:
    """Whether the run's supervisor lives on this machine."""
    return _supervisor(run) is not None


def cancel(run: Path) -> bool:
    """Tell the supervisor to end its tasks and itself; False if there is none."""
    pid = _supervisor(run)
    if pid is None:
        return False
    os.kill(pid, signal.SIGTERM)
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


class _Terminated(BaseException):
    """SIGTERM or SIGINT reached the supervisor."""


def supervise(run: Path) -> int:
    """Run the job until it has finished, or must not be started again. Returns 0 if it has finished."""

    def terminate(signum: int, frame: FrameType | None) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGINT, terminate)
    spec = history.read_spec(run)
    try:
        while True:
            action = _attempt(run, spec)
            if action != "again":
                return 0 if action == "done" else 1
    except _Terminated:
        return 1


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
        status = _wait(job, spec["tasks_per_node"], history.attempt_folder(run, job.job_id, 0))
    except _Terminated:
        _end_tasks(job)
        history.record(
            run, "end", job=job.job_id, restart=0, reason="cancelled", detail="the supervisor was told to end", node=None,
            checkpoint=history.newest_checkpoint(run), new=False, action="stop", why="cancelled",
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
    for pid in tasks:
        _kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and any(start_time(pid) is not None for pid in tasks):
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
    sys.exit(supervise(Path(sys.argv[1])))
