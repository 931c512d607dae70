"""Follow-up jobs: the next job of a run, queued by the job hook where Slurm does not requeue the same one.

Standard library alone, Python >= 3.8: this runs on the host of the batch script.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Sequence  # noqa: UP035 (Python 3.8 runs this file)

from dattrain.files import write_atomically
from dattrain.submit import command
from dattrain.submit.history import expand, history, record, since_submission, submitted_jobs


def script_of(text: str, task: int | None) -> str:
    """Text of a follow-up's batch script: the same, but for a job of its own where the first was task ``task`` of an array."""
    if task is None:
        return text
    lines = [line for line in text.splitlines(keepends=True) if not line.startswith("#SBATCH --array")]
    return "".join(lines).replace("%A_%a", "%j").replace("${SLURM_ARRAY_TASK_ID:-0}", str(task))


def submit(run: str, spec: dict[str, Any], job: str, dependency: str, exclude: Sequence[str]) -> str | None:
    """Submit the same script again, with submitit's pickle, and turn the jobs that wait for this one to the new one too.

    Returns the new job's id, or None: the history then has a warning that says why.
    """
    folder = Path(spec["folder"])
    array, _, task = job.partition("_")
    script = folder / f"follow_up_of_{job}.sh"
    try:
        original = (folder / f"{array}_submission.sh").read_text(encoding="utf-8")
        text = script_of(original, int(task) if task else None)
        script.write_text(text, encoding="utf-8")
        work = (folder / f"{job}_submitted.pkl").read_bytes()
    except OSError as error:
        warn(run, job, f"no follow-up: {error.filename or folder}: {error.strerror}")
        return None
    options = ["--kill-on-invalid-dep=yes", "--dependency=" + dependency]
    options += ["--exclude=" + ",".join(exclude)] if exclude else []
    follower, why = command.sbatch(script, text, *options)
    if follower is None:
        warn(run, job, "no follow-up: " + why)
        return None
    write_atomically(folder / f"{follower}_submitted.pkl", work)
    script.replace(folder / f"{follower}_submission.sh")
    record(run, "submit", job=follower, by="follow-up", after=job, dependency=dependency)
    for child in _dependent_jobs(spec):
        # Queued beforehand, it is needed only if this job fails; else it alone counts.
        need = ("afterok:" + job + "?" if dependency.startswith("afternotok") else "") + "afterok:" + follower
        if command.run("scontrol", "update", "JobId=" + child, "Dependency=" + need) is not None:
            say(f"job {child} still waits for {job} alone: submit that stage again, with --after this run")
    return follower


def find(run: str, job: str) -> str | None:
    """The job that was queued to follow ``job``, or None."""
    return next(
        (e["job"] for e in reversed(history(run)) if e["event"] == "submit" and e.get("after") == job), None
    )


def cancel(run: str, job: str) -> None:
    """Cancel the job that was queued to follow ``job``, if there is one."""
    follower = find(run, job)
    if follower:
        command.run("scancel", follower)


def exclude_nodes(run: str, spec: dict[str, Any], job: str, nodes: Sequence[str]) -> None:
    """Keep the job that was queued to follow ``job`` off ``nodes``; where Slurm refuses, queue another in its place."""
    follower = find(run, job)
    if follower is None:
        return
    if command.run("scontrol", "update", "JobId=" + follower, "ExcNodeList=" + ",".join(nodes)) is not None:
        command.run("scancel", follower)
        submit(run, spec, job, "afternotok:" + job, nodes)


def excluded_nodes(run: str, spec: dict[str, Any]) -> list[str]:
    """The profile's nodes to avoid, and those that failed twice since the run was submitted."""
    found = [node for e in since_submission(history(run)) for node in e.get("exclude", [])]
    return sorted({*expand(spec.get("exclude") or ""), *found})


def _dependent_jobs(spec: dict[str, Any]) -> list[str]:
    """Jobs of the chain's next stages that were queued behind this run."""
    waiting: list[str] = []
    for run in spec.get("dependents", []):
        waiting += submitted_jobs(history(run))[-1:]
    return waiting


def warn(run: str, job: str, text: str) -> None:
    """Say what keeps the run from resuming, here and in ``dattrain status``."""
    record(run, "warning", job=job, text=text)
    say(text)


def say(message: str) -> None:
    """Write a line into the batch script's error file."""
    print("dattrain: " + message, file=sys.stderr, flush=True)
