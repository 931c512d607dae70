"""State of a job in Slurm, from all sources: the batch script's error file, scontrol and sacct.

Standard library alone, Python >= 3.8: the job hook (``dattrain.submit.job_hook``) runs this on the host. A job that is being
ended is COMPLETING, whatever for. Why, slurmstepd writes into the error file (``*** JOB 5 ON n1 CANCELLED AT ... DUE TO
PREEMPTION ***``; nothing is due to anything where a user called scancel), and sacct may know it too.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence  # noqa: UP035 (Python 3.8 runs this file)

from dattrain.submit import command

ATTEMPT_MARK = "dattrain: attempt on "
"""Divides the attempts in the error file, which every restart appends to."""

STATES = {
    "PREEMPTION": "PREEMPTED",
    "JOB REQUEUE": "REQUEUED",
    "TIME LIMIT": "TIMEOUT",
    "NODE FAILURE": "NODE_FAIL",
}
"""What slurmstepd says that an end is due to, and Slurm's state for it."""

GRACE = "PREEMPTING"
"""Ours, of a job that runs in the grace period before it is preempted: the tasks had SIGTERM, and the script may still act."""

LIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING")

WAIT_S = 3.0
"""How long a job may be ending without a known cause: slurmstepd writes while the signal is on its way."""


TIMEOUT_S = 10.0
"""Seconds that a command has to answer; Slurm's patience with a job that ends is short."""


class JobStatus(NamedTuple):
    """Slurm's state of a job, as exactly as it is known, and whether Slurm itself will start it again."""

    state: str | None
    requeued: bool = False


def state_from_stderr(stderr: str) -> str | None:
    """State by slurmstepd's messages, the last one of the job before those of its steps; None without any.

    A step alone is cancelled by srun too, when a task has died: only what that is due to counts.
    """
    states: dict[str, str] = {}
    for kind, _, due in re.findall(
        r"\*\*\* (JOB|STEP) \S+ ON \S+ CANCELLED AT \S+( +DUE TO ([A-Z ]+?))? *\*\*\*", stderr, re.IGNORECASE
    ):
        state = STATES.get(due.upper(), "CANCELLED" if kind.upper() == "JOB" else "")
        if state:
            states[kind.upper()] = state
    return states.get("JOB") or states.get("STEP")


def combine(stderr: str, scontrol: str, sacct: str, restart: int) -> JobStatus:
    """Combine the three sources. Pure.

    Args:
        stderr: the attempt's part of the batch script's error file.
        scontrol: ``scontrol show job``; empty where it is missing.
        sacct: the state that it gives; empty where there is none.
        restart: SLURM_RESTART_COUNT of the attempt; Slurm counts on when it requeues, before it ends the old attempt.
    """
    match = re.search(r"JobState=(\w+)(?: Reason=(\w+))?", scontrol)
    count = re.search(r"\bRestarts=(\d+)", scontrol)
    requeued = count is not None and int(count.group(1)) > restart
    known = match.group(1) if match else None
    from_stderr = state_from_stderr(stderr)
    if from_stderr is not None and from_stderr != "CANCELLED":
        return JobStatus(from_stderr, requeued)
    if sacct and sacct not in LIVE:
        return JobStatus(sacct, requeued)
    if requeued:
        return JobStatus("REQUEUED", requeued)
    if (
        from_stderr is None
        and known in ("COMPLETING", "RUNNING")
        and re.search(r"\bPreemptTime=\d", scontrol)
    ):
        return JobStatus("PREEMPTED" if known == "COMPLETING" else GRACE, requeued)
    if match is not None and match.group(2) in ("TimeLimit", "NodeDown"):
        return JobStatus({"TimeLimit": "TIMEOUT", "NodeDown": "NODE_FAIL"}[match.group(2)], requeued)
    return JobStatus(from_stderr or known, requeued)


def query(job: str, restart: int, stderr: Callable[[], str], wait_s: float = WAIT_S) -> JobStatus:
    """Query a job that runs, or ends just now. sacct, which may be slow, is asked only where it is needed."""
    deadline = time.monotonic() + wait_s
    while True:
        shown = command.output("scontrol", "show", "job", job, timeout_s=TIMEOUT_S)
        found = combine(stderr(), shown, "", restart)
        if found.state == "COMPLETING":
            found = combine(stderr(), shown, sacct_state(job), restart)
        if found.state != "COMPLETING" or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def query_ended(job: str, stderr: str) -> JobStatus:
    """Query an attempt without a recorded end; the job may have been started again since, or be forgotten."""
    from_stderr = state_from_stderr(stderr)
    if from_stderr is not None and from_stderr != "CANCELLED":
        return JobStatus(from_stderr)
    found = sacct_state(job)
    found = found or scontrol_state(job)
    return JobStatus(from_stderr if found in ("", *LIVE) else found)


def scontrol_state(job: str) -> str:
    """State of a job by scontrol; empty where it is missing or has forgotten the job."""
    match = re.search(r"JobState=(\w+)", command.output("scontrol", "show", "job", job, timeout_s=TIMEOUT_S))
    return match.group(1) if match else ""


def sacct_state(job: str) -> str:
    """State of a job by sacct: of the attempt that ended last. Empty where sacct is missing or knows nothing."""
    rows = command.output(
        "sacct", "-n", "-P", "-X", "-D", "-o", "State", "-j", job, timeout_s=TIMEOUT_S
    ).split("\n")
    ended = [row.split()[0].rstrip("+") for row in rows if row.strip() and row.split()[0] not in LIVE]
    return ended[-1] if ended else ""


def stderr_of(spec: dict[str, Any], job: str) -> str:
    """Messages of srun and slurmstepd in a job's last attempt: ``begin`` leaves a mark before each."""
    path = Path(spec["folder"]) / f"{job}_0_log.err"
    if not path.is_file():
        return ""
    return path.read_text(encoding="utf-8", errors="replace").rpartition(ATTEMPT_MARK)[2]


def last_error_line(text: str) -> str:
    """The last line of an error file that says more than that something ended, cut to 400 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    informative = [line for line in lines if not _NOISE.search(line)]
    return (informative or lines or [""])[-1][-400:]


_NOISE = re.compile(
    r"^(\++ .*|Terminated|Killed|Aborted|User defined signal [12]"
    r"|srun: (got SIGCONT|forcing job termination|Job step aborted|Terminating|Force Terminated|launch/slurm)\b.*"
    r"|srun: error: \S+: tasks? \S+: (Exited with exit code \d+|Terminated|Killed|Aborted)"
    r"|slurmstepd\S*: error: \*\*\* STEP .*|dattrain: attempt on .*|Try .\w+ --help. for more information)( \(core dumped\))?$"
)
"""What Slurm and the shell (with ``set -x``) say of every end, whatever the cause."""


def last_error_of_rank(spec: dict[str, Any], job: str, rank: int) -> str:
    """Last line of a rank's error file; of rank 0 the batch script's too, which Slurm's ``--error`` names alike."""
    if rank == 0:
        return last_error_line(stderr_of(spec, job))
    path = Path(spec["folder"]) / f"{job}_{rank}_log.err"
    return last_error_line(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else ""


def down_nodes(nodes: Sequence[str]) -> list[str]:
    """Nodes among these that are down, as far as sinfo knows."""
    rows = command.output(
        "sinfo", "-h", "-N", "-n", ",".join(nodes), "-o", "%N %T", timeout_s=TIMEOUT_S
    ).split("\n")
    return sorted({row.split()[0] for row in rows if re.search(r"down|fail|drain|not_responding|\*", row)})
