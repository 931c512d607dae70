"""The submission: stages are checked, their run folders set up, and their jobs queued. What begins to exist begins here."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dattrain.config.load import dump, reasons
from dattrain.config.run import absolute
from dattrain.errors import UserError
from dattrain.files import shown, write_text
from dattrain.runtime import owner
from dattrain.submit import checks, command, history, local, local_turns, queue, slurm, snapshot
from dattrain.submit.cluster import Profile
from dattrain.submit.dependency import dependency_on
from dattrain.submit.job import Job
from dattrain.submit.plan import Stage, SubmissionPlan, SubmitRequest, describe, plan
from dattrain.submit.slurm import Placement


def submit(request: SubmitRequest) -> int:
    """Check a request, then print its plan (``dry_run``) or submit it. Returns the exit code, 0.

    Raises:
        ConfigError: the recipe, the chain, the profile or the command line is wrong.
        UserError: a run folder is taken, or Slurm refuses.
    """
    planned = plan(request)
    notes: list[str] = []
    upstream = None
    if request.after is not None and not request.dry_run:
        dependency, upstream = dependency_on(request.after)
        planned = replace(
            planned,
            stages=tuple(
                replace(stage, after=dependency) if need is None else stage
                for stage, need in zip(planned.stages, planned.needs)
            ),
        )
        if dependency is None:
            upstream = None
            notes.append(f"--after {request.after}: it has ended well already, so nothing is waited for")
    checks.check(planned, request)
    for stage in planned.stages:
        notes += [*stage.notes, *checks.overruled(stage, os.environ)]
        with checks.named(planned, stage):
            for run, loaded in zip(stage.runs, stage.loaded):
                checks.check_run(run, loaded)
    if request.dry_run:
        print(describe(planned), flush=True)
        if any(stage.profile.kind == "slurm" for stage in planned.stages):
            if queue.answers():
                for stage in planned.stages:
                    with checks.named(planned, stage):
                        notes += checks.check_slurm(stage)
            else:
                notes.append("no Slurm answers here, and so it was not asked")
        _print_notes(notes)
        return 0
    for stage in planned.stages:
        with checks.named(planned, stage):
            notes += checks.check_slurm(stage)
    _print_notes(notes)
    with reserved(planned.stages):
        for index, stage in enumerate(planned.stages):
            prepare(
                stage,
                [run for s, need in zip(planned.stages, planned.needs) if need == index for run in s.runs],
            )
        if planned.root is not None:
            _write_chain(planned, planned.root)
        supervisor = None
        if planned.stages[0].profile.kind == "local":
            supervisor = _start_here(planned)
        else:
            _submit_stages(planned)
        if upstream is not None:
            add_dependents(upstream, planned.stages[0].runs)
    first = planned.stages[0].runs
    all_of_it = shown(planned.root or (first[0] if len(first) == 1 else first[0].parent))
    print(
        f"dattrain status {all_of_it}    dattrain logs {shown(first[0])} -f    dattrain cancel {all_of_it}",
        flush=True,
    )
    if supervisor is not None and len(planned.runs) > 1:
        return local_turns.follow(supervisor, planned.runs, again=_again(request))
    return 0


def _start_here(planned: SubmissionPlan) -> subprocess.Popen[bytes]:
    supervisor = local.start(planned.runs, planned.stages[0].profile)
    for stage in planned.stages:
        for run in stage.runs:
            print(f"{stage.name}: job {local.job_of(supervisor)}, run folder {shown(run)}")
    return supervisor


def _again(request: SubmitRequest) -> str:
    """The command line of a request for this machine."""
    words = ["dattrain", "submit", request.config, *request.overrides, "--cluster", request.cluster]
    words += ["--array", *request.array] if request.array else []
    for option, value, usual in (
        ("--gpus-per-node", request.gpus_per_node, None),
        ("--time", request.time, None),
        ("--retries", request.retries, 3),
        ("--run", request.folder, None),
    ):
        words += [option, str(value)] if value != usual else []
    return shlex.join([*words, *["--yes"] * request.yes])


def _submit_stages(planned: SubmissionPlan) -> None:
    jobs: list[list[str]] = []
    for stage, need in zip(planned.stages, planned.needs):
        try:
            jobs.append(submit_stage(stage, f"afterok:{jobs[need][0]}" if need is not None else None))
        except UserError as error:
            if not jobs:
                raise
            # A limit on a user's jobs meets a chain in its middle.
            after = f" --after {shown(planned.stages[need].runs[0])}" if need is not None else ""
            raise UserError(
                f"{stage.name}: {error}. What is printed above is queued; submit the rest once Slurm takes it: "
                f"dattrain submit {shown(stage.runs[0])}{after}, and so on, with the same --cluster and size"
            ) from None
        for run, job in zip(stage.runs, jobs[-1]):
            print(f"{stage.name}: job {job}, run folder {shown(run)}")


def _print_notes(lines: Sequence[str]) -> None:
    for line in dict.fromkeys(lines):
        print(f"dattrain submit: {line}", file=sys.stderr)


def _write_chain(planned: SubmissionPlan, root: Path) -> None:
    content = {
        "name": planned.chain,
        "stages": [{"name": stage.runs[0].name, "run": str(stage.runs[0])} for stage in planned.stages],
    }
    write_text(root / "chain.json", json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def reserved(stages: Sequence[Stage]) -> Iterator[None]:
    """Keep other submissions out of the run folders of ``stages`` while the block prepares and submits them.

    Raises:
        UserError: another one does, or has just done.
    """
    with contextlib.ExitStack() as stack:
        for stage in stages:
            stack.enter_context(owner.acquire(stage.placement().folder.parent, "submitted"))
            for run in stage.runs:
                checks.refuse_second_job(run)
        yield


def prepare(stage: Stage, dependents: Sequence[Path] = ()) -> None:
    """Set the run folders of a stage up: resolved config, code, and what the job hook needs to know."""
    folder = stage.placement().folder
    for run, loaded in zip(stage.runs, stage.loaded):
        (run / "submit").mkdir(parents=True, exist_ok=True)
        write_text(run / "config.yaml", dump(absolute(loaded.config), reasons(loaded)))
        snapshot.create(run)
        with contextlib.suppress(FileNotFoundError):
            (run / "stop").unlink()
        spec = {
            "name": stage.name,
            "action": stage.action,
            "cluster": stage.profile_name,
            "nodes": list(stage.nodes),
            "tasks_per_node": stage.profile.tasks,
            "time_s": stage.minutes * 60,
            "signal_delay_s": stage.profile.signal_delay_s,
            "retries": stage.retries,
            "requeue": stage.profile.requeue,
            "exclude": stage.profile.exclude,
            "folder": str(folder),
            "dependents": [str(path) for path in dependents],
            "profile": stage.profile.model_dump(mode="json"),
        }
        write_text(run / "submit" / "spec.json", json.dumps(spec, indent=2) + "\n")
    folder.mkdir(parents=True, exist_ok=True)


def submit_stage(stage: Stage, dependency: str | None = None) -> list[str]:
    """Submit a prepared stage; returns one job id per run.

    Raises:
        UserError: Slurm refuses it.
    """
    if stage.profile.kind == "local":
        return [local.job_of(local.start(stage.runs, stage.profile))] * len(stage.runs)
    place = stage.placement(dependency)
    jobs = [Job(str(run), stage.action) for run in stage.runs]
    ids = _submit_slurm(stage.profile, place, jobs)
    for run, job in zip(stage.runs, ids):
        history.record(run, "submit", job=job, by="user", nodes=place.nodes_text, dependency=place.dependency)
    return ids


def _submit_slurm(profile: Profile, place: Placement, jobs: Sequence[Job]) -> list[str]:
    from submitit.core.utils import DelayedSubmission

    text = slurm.script(profile, place)
    staged = place.folder / f".{secrets.token_hex(8)}"
    staged.write_text(text, encoding="utf-8")
    first, why = command.sbatch(staged, text)
    if first is None:
        staged.unlink()
        raise UserError(f"not submitted: {why}")
    staged.replace(place.folder / f"{first}_submission.sh")
    ids = [first] if len(jobs) == 1 else [f"{first}_{n}" for n in range(len(jobs))]
    for job, identity in zip(jobs, ids):
        delayed = DelayedSubmission(job)
        delayed.set_timeout(place.minutes, slurm.TIMEOUTS)
        delayed.dump(staged)
        staged.replace(place.folder / f"{identity}_submitted.pkl")
    return ids


def add_dependents(run: Path, waiting: Sequence[Path]) -> None:
    """Name runs that were queued behind ``run`` to its job hook, which turns their dependency to a follow-up job."""
    path = run / "submit" / "spec.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    spec["dependents"] = list(dict.fromkeys([*spec["dependents"], *map(str, waiting)]))
    write_text(path, json.dumps(spec, indent=2) + "\n")
