"""State of jobs in Slurm: from squeue while they live, then from sacct, else from scontrol's memory.

sacct may be missing or may lag, squeue forgets, scontrol forgets later: so each is asked for what the one before did not
know. A state that only says what happened to an attempt (NODE_FAIL, REQUEUED) is never taken as final.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dattrain.errors import UserError
from dattrain.submit import command
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
        "FORGOTTEN",
    ]
)
"""A preempted job that Slurm starts again is PENDING, not PREEMPTED. FORGOTTEN is ours."""
MAY_REQUEUE = frozenset({"NODE_FAIL", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"})
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
        return self.state in FINAL or (self.state in MAY_REQUEUE and self.source == "sacct")

    @property
    def never_starts(self) -> bool:
        """Behind a job that failed, on a cluster that does not cancel such jobs."""
        return self.reason == "DependencyNeverSatisfied"


UNKNOWN = JobState("UNKNOWN")
"""Slurm does not answer."""
FORGOTTEN = JobState("FORGOTTEN", source="scontrol")
"""The controller answers, and knows the job no more: it is over (for MinJobAge, five minutes by default), however it ended."""


def answers() -> bool:
    """Whether there is a Slurm that this machine can ask."""
    return bool(command.output("sinfo", "-h", "-o", "%P", timeout_s=20.0).strip())


def states(jobs: Iterable[str]) -> dict[str, JobState]:
    """State of each job (``123`` or ``123_4``); FORGOTTEN for what no command knows, UNKNOWN where none answers."""
    wanted = list(dict.fromkeys(jobs))
    if not wanted:
        return {}
    live = _squeue(wanted)
    found = {job: live[job] for job in wanted if job in live and live[job].state not in FINAL | MAY_REQUEUE}
    missing = [job for job in wanted if job not in found]
    if missing:
        past = _sacct(missing)
        for job in missing:
            found[job] = live.get(job) or past.get(job) or _from_scontrol(job)
    return found


def _squeue(jobs: Sequence[str]) -> dict[str, JobState]:
    return parse_squeue(
        command.output("squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%r|%N", "-j", _numbers(jobs))
    )


def _sacct(jobs: Sequence[str]) -> dict[str, JobState]:
    return parse_sacct(
        command.output("sacct", "-n", "-P", "-X", "-o", "JobID,State,NodeList", "-j", _numbers(jobs))
    )


def _from_scontrol(job: str) -> JobState:
    found = parse_scontrol(command.output("scontrol", "-o", "show", "job", job))
    if found == UNKNOWN and "Invalid job id" in (command.run("scontrol", "-o", "show", "job", job) or ""):
        return FORGOTTEN
    return found


def task_states(job: str) -> dict[str, JobState]:
    """State of a job, or of each known task where it is an array; empty where no command knows it."""
    found = _sacct([job])
    shown = command.output("scontrol", "-o", "show", "job", job).splitlines()
    for line in shown:
        array = re.search(r"ArrayJobId=(\d+) ArrayTaskId=(\S+)", line)
        state = parse_scontrol(line)
        if state != UNKNOWN:
            # Pending tasks are one line: 7_[2-5%2].
            for name in _task_names(f"{array[1]}_[{array[2]}]") if array else [job]:
                found[name] = state
    found.update(_squeue([job]))
    return {name: state for name, state in found.items() if job in (name, name.partition("_")[0])}


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
            for one in _task_names(job):
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


def exit_of(job: str) -> tuple[str, str]:
    """Exit code (``status:signal``) and reason of a job that is over, as far as scontrol or sacct know them."""
    shown = command.output("scontrol", "-o", "show", "job", job)
    code, reason = (re.search(rf"\b{key}=(\S+)", shown) for key in ("ExitCode", "Reason"))
    if code is not None:
        return code.group(1), "" if reason is None or reason.group(1) == "None" else reason.group(1)
    rows = command.output("sacct", "-n", "-P", "-X", "-o", "ExitCode,Reason", "-j", job).splitlines()
    found, _, why = rows[-1].partition("|") if rows else ("", "", "")
    return found, "" if why == "None" else why


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs (scancel).

    Raises:
        UserError: scancel is missing, refuses or hangs.
    """
    if shutil.which("scancel") is None:
        raise UserError("scancel is not on the PATH: run this on a login node of the cluster")
    refused = command.run("scancel", *jobs)
    if refused is not None:
        raise UserError(f"scancel {' '.join(jobs)}: {refused}")


@dataclass(frozen=True)
class Requirements:
    """What a job asks of its partition, as far as it is looked at here."""

    partition: str | None = None
    """One, or several divided by commas; None is the default one."""
    nodes: int = 1
    cpus: int = 1
    """Cores of a node."""
    minutes: int = 1
    reservation: str | None = None


def check(script: str, need: Requirements) -> tuple[str | None, str | None]:
    """Why Slurm would not take a script, or would never start it, in one line that helps; and a line on why not soon.

    ``sbatch --test-only`` queues nothing. It refuses what sbatch would queue while nodes are down or drained, and before a
    reservation begins: what the partition could run then passes. It lets pass what waits for ever where EnforcePartLimits is
    off: so the partition's time limit is looked at too.
    """
    if shutil.which("sbatch") is None:
        return (
            "sbatch is not on the PATH: run this on a login node of the cluster, or use --cluster local",
            None,
        )
    said = command.test_only(script)
    if said is None:
        return _over_the_limit(need), None
    if "partition" in said.lower() and need.partition is not None:
        known = sorted({name.rstrip("*") for name in command.output("sinfo", "-h", "-o", "%P").split()})
        unknown = [name for name in need.partition.split(",") if name not in known]
        if known and unknown:
            return f"partition {unknown[0]!r} does not exist here; there are: {', '.join(known)}", None
    later = _why_not_now(said, need)
    return (said, None) if later is None else (_over_the_limit(need), later)


_OUT = re.compile(r"down|drain|fail|maint|reserved|reboot|unk|future|inval|power|\*")
"""In the states of nodes that may come back; ``*`` is no answer."""


def _why_not_now(said: str, need: Requirements) -> str | None:
    """Why the job waits, where what ``--test-only`` said is about the present; None where it is for good."""
    if need.reservation is not None and "Invalid time specified" in said:
        return f"queued, though reservation {need.reservation} has not begun"
    if not re.search(r"(?i)node configuration is not available|node not available|nodes are busy", said):
        return None
    fitting, out = set(), set()
    for line in command.output("sinfo", "-h", "-N", "-o", "%P|%N|%c|%T").splitlines():
        name, node, cpus, state = (line.split("|") + [""] * 4)[:4]
        wanted = (
            name.endswith("*") if need.partition is None else name.rstrip("*") in need.partition.split(",")
        )
        if wanted and cpus.isdigit() and int(cpus) >= need.cpus:
            fitting.add(node)
            if _OUT.search(state):
                out.add(f"{node} ({state})")
    if not out or len(fitting) < need.nodes:
        return None
    names = sorted(out)
    return f"queued, though some nodes are not available now: {', '.join(names[:4])}" + (
        f" and {len(names) - 4} more" if len(names) > 4 else ""
    )


def _over_the_limit(need: Requirements) -> str | None:
    for line in command.output("sinfo", "-h", "-o", "%P|%l").splitlines():
        name, _, limit = line.partition("|")
        if (name.endswith("*") and need.partition is None) or name.rstrip("*") == need.partition:
            try:
                most = minutes(limit)
            except ValueError:
                return None
            if need.minutes > most:
                return f"--time is {need.minutes} minutes, but partition {name.rstrip('*')} allows {limit} ({most} minutes)"
    return None


def _numbers(jobs: Sequence[str]) -> str:
    """Ids of the jobs, an array's once, divided by commas."""
    return ",".join(dict.fromkeys(job.partition("_")[0] for job in jobs))


def _task_names(job: str) -> list[str]:
    """``7_[0-2,5%3]`` -> 7_0, 7_1, 7_2, 7_5."""
    match = re.fullmatch(r"(\d+)_\[([\d,\-]+)(?:%\d+)?\]", job)
    if match is None:
        return [job]
    found = []
    for part in match.group(2).split(","):
        low, _, high = part.partition("-")
        found += [f"{match.group(1)}_{n}" for n in range(int(low), int(high or low) + 1)]
    return found
