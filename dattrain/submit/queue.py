"""What Slurm says of a job: from squeue while it lives, then from sacct, else from scontrol's memory.

sacct may be missing or may lag, squeue forgets, scontrol forgets later: so each is asked for what the one before did not
know. A state that only says what happened to an attempt (NODE_FAIL, REQUEUED) is never taken as final.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dattrain.errors import UserError
from dattrain.submit.cluster import minutes

FINAL = frozenset(
    [
        "COMPLETED",
        "FAILED",
        "CANCELLED",
        "TIMEOUT",
        "PREEMPTED",
        "DEADLINE",
        "OUT_OF_MEMORY",
        "BOOT_FAIL",
        "REVOKED",
    ]
)
"""A preempted job that Slurm starts again is PENDING, not PREEMPTED."""
PASSING = frozenset({"NODE_FAIL", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"})
"""States after which Slurm may start the same job again."""


@dataclass(frozen=True)
class JobState:
    """One job as Slurm knows it."""

    state: str
    reason: str = ""
    nodes: str = ""
    source: str = ""

    @property
    def final(self) -> bool:
        """Whether nothing more happens to this job."""
        return self.state in FINAL or (self.state in PASSING and self.source == "sacct")

    @property
    def waiting_in_vain(self) -> bool:
        """Behind a job that failed, on a cluster that does not cancel such jobs."""
        return self.reason == "DependencyNeverSatisfied"


UNKNOWN = JobState("UNKNOWN")


def states(jobs: Iterable[str]) -> dict[str, JobState]:
    """State of each job (``123`` or ``123_4``); UNKNOWN for what no command knows."""
    wanted = list(dict.fromkeys(jobs))
    if not wanted:
        return {}
    live = parse_squeue(
        _output(["squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%r|%N", "-j", ",".join(_numbers(wanted))])
    )
    found = {job: live[job] for job in wanted if job in live and live[job].state not in FINAL | PASSING}
    missing = [job for job in wanted if job not in found]
    if missing:
        past = parse_sacct(
            _output(
                ["sacct", "-n", "-P", "-X", "-o", "JobID,State,NodeList", "-j", ",".join(_numbers(missing))]
            )
        )
        for job in missing:
            if job in live:
                found[job] = live[job]
            elif job in past:
                found[job] = past[job]
            else:
                found[job] = parse_scontrol(_output(["scontrol", "-o", "show", "job", job]))
    return found


def parse_squeue(text: str) -> dict[str, JobState]:
    """Lines of ``squeue -h -r -o '%i|%T|%r|%N'``."""
    found = {}
    for line in text.splitlines():
        job, state, reason, nodes = (line.strip().split("|") + [""] * 4)[:4]
        if job:
            found[job] = JobState(state, "" if reason == "None" else reason, nodes, "squeue")
    return found


def parse_sacct(text: str) -> dict[str, JobState]:
    """Lines of ``sacct -n -P -X -o JobID,State,NodeList``; ``CANCELLED by 0`` is CANCELLED."""
    found = {}
    for line in text.splitlines():
        job, state, nodes = (line.strip().split("|") + [""] * 3)[:3]
        if job and state:
            nodes = "" if nodes == "None assigned" else nodes
            for one in _array(job):
                found[one] = JobState(state.split()[0].rstrip("+"), "", nodes, "sacct")
    return found


def parse_scontrol(text: str) -> JobState:
    """``scontrol -o show job N``; an array's task is the line that names it."""
    match = re.search(r"JobState=(\S+)(?:.*?Reason=(\S+))?", text)
    if match is None:
        return UNKNOWN
    nodes = re.search(r" NodeList=(\S+)", text)
    reason = match.group(2) or ""
    return JobState(
        match.group(1),
        "" if reason == "None" else reason,
        "" if nodes is None or nodes.group(1) == "(null)" else nodes.group(1),
        "scontrol",
    )


def ending(job: str) -> tuple[str, str]:
    """Exit code (``status:signal``) and reason of a job that is over, as far as scontrol or sacct know them."""
    shown = _output(["scontrol", "-o", "show", "job", job])
    code, reason = (re.search(rf"\b{key}=(\S+)", shown) for key in ("ExitCode", "Reason"))
    if code is not None:
        return code.group(1), "" if reason is None or reason.group(1) == "None" else reason.group(1)
    rows = _output(["sacct", "-n", "-P", "-X", "-o", "ExitCode,Reason", "-j", job]).splitlines()
    found, _, why = rows[-1].partition("|") if rows else ("", "", "")
    return found, "" if why == "None" else why


def cancel(jobs: Sequence[str]) -> None:
    """scancel.

    Raises:
        UserError: scancel is missing or refuses.
    """
    try:
        done = subprocess.run(["scancel", *jobs], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise UserError("scancel is not on the PATH: run this on a login node of the cluster") from None
    if done.returncode != 0:
        raise UserError(f"scancel {' '.join(jobs)}: {done.stderr.strip()}")


def refusal(script: str, partition: str | None, time_min: int) -> str | None:
    """Why Slurm would not take a script, or would never start it, in one line that helps; None if it would.

    ``sbatch --test-only`` queues nothing. It lets pass what waits for ever where EnforcePartLimits is off, so the
    partition's time limit is looked at too.
    """
    if shutil.which("sbatch") is None:
        return "sbatch is not on the PATH: run this on a login node of the cluster, or use --cluster local"
    done = subprocess.run(
        ["sbatch", "--test-only"], input=script, capture_output=True, text=True, timeout=120
    )
    if done.returncode == 0:
        return _too_long(partition, time_min)
    errors = [
        re.sub(r"^(sbatch: )?(error: |fatal: )?(allocation failure: )?", "", line)
        for line in done.stderr.splitlines()
        if line.strip()
    ]
    said = "; ".join(dict.fromkeys(errors)) or f"sbatch --test-only ended with status {done.returncode}"
    if "partition" in said.lower():
        known = sorted({name.rstrip("*") for name in _output(["sinfo", "-h", "-o", "%P"]).split()})
        if known and partition is not None and partition not in known:
            return f"partition {partition!r} does not exist here; there are: {', '.join(known)}"
    return said


def _too_long(partition: str | None, time_min: int) -> str | None:
    for line in _output(["sinfo", "-h", "-o", "%P|%l"]).splitlines():
        name, _, limit = line.partition("|")
        if (name.endswith("*") and partition is None) or name.rstrip("*") == partition:
            try:
                most = minutes(limit)
            except ValueError:
                return None
            if time_min > most:
                return f"--time is {time_min} minutes, but partition {name.rstrip('*')} allows {limit} ({most} minutes)"
    return None


def _numbers(jobs: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(job.partition("_")[0] for job in jobs))


def _array(job: str) -> list[str]:
    """``7_[0-2,5%3]`` -> 7_0, 7_1, 7_2, 7_5."""
    match = re.fullmatch(r"(\d+)_\[([\d,\-]+)(?:%\d+)?\]", job)
    if match is None:
        return [job]
    found = []
    for part in match.group(2).split(","):
        low, _, high = part.partition("-")
        found += [f"{match.group(1)}_{n}" for n in range(int(low), int(high or low) + 1)]
    return found


def _output(command: list[str]) -> str:
    """Standard output, empty where the command is missing, refuses (an id that it forgot) or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
