"""From a recipe and a profile to jobs in the queue: check everything first, then set the run folder up, then submit.

``plan`` is pure but for reading files; ``submit`` is where things begin to exist.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dattrain.config.derive import check_source, derive
from dattrain.config.load import Loaded, dump
from dattrain.engine import resume_rules
from dattrain.errors import ConfigError, UserError
from dattrain.files import write_atomically
from dattrain.runtime import owner
from dattrain.submit import command, history, host, queue, run_status, shell, slurm, snapshot
from dattrain.submit.cluster import Profile
from dattrain.submit.job import Job
from dattrain.submit.slurm import Placement
from dattrain.urls import mask

STARTUP_S = 15.0
"""Seconds that a job spends before its first step: imports, process group, data, checkpoint. A guess on the small side."""


NAME_BYTES = 255
"""Longest name of a file or folder, on all file systems of note."""


@dataclass(frozen=True)
class Stage:
    """One run (or an array of runs, alike but for one setting) with its size."""

    name: str
    runs: tuple[Path, ...]
    """Run folders, absolute."""
    loaded: tuple[Loaded, ...]
    profile: Profile
    profile_name: str
    nodes: tuple[int, int]
    minutes: int
    retries: int = 3
    action: Literal["train", "evaluate"] = "train"
    after: str | None = None
    """A dependency on a job that is there already, in sbatch's notation."""
    parallel: int | None = None
    """Most runs of the array at a time."""
    notes: tuple[str, ...] = ()
    """What the user may not expect, a line each."""

    def placement(self, dependency: str | None) -> Placement:
        """Where its files lie."""
        root = self.runs[0] if len(self.runs) == 1 else self.runs[0].parent
        return Placement(
            self.name,
            self.runs,
            root / "submit" / "slurm",
            self.nodes,
            self.minutes,
            dependency or self.after,
            self.parallel,
        )


def nodes_range(text: str) -> tuple[int, int]:
    """``2`` or ``2-4``.

    Raises:
        ConfigError: it is neither.
    """
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    low, high = (int(match.group(1)), int(match.group(2) or match.group(1))) if match else (0, 0)
    if not 1 <= low <= high:
        raise ConfigError(f"--nodes {text}: write a number of nodes, or fewest-most as in 2-4")
    return low, high


def check(stage: Stage, images_per_second: float | None = None, *, waits: bool = False) -> None:
    """Refuse what would fail later, naming the setting.

    Args:
        waits: for another stage, which may write what this one starts from.

    Raises:
        ConfigError: the batch does not divide over every number of devices that the job may get, the time limit has no
            room for a step and a save, a local run asks for more than one node, a fine-tune starts from nowhere, or a
            path has characters that Slurm does not take as they are, or too long a name.
        UserError: a fine-tune starts from what is not there.
    """
    profile = stage.profile
    for part in (part for run in stage.runs for part in run.parts if len(os.fsencode(part)) > NAME_BYTES):
        raise ConfigError(
            f"run folder: {part[:40]}… is a name of {len(os.fsencode(part))} bytes, and file systems take {NAME_BYTES}; "
            "choose another --run (of an array: shorter values)"
        )
    if profile.kind == "slurm":
        for folder in (*stage.runs, stage.placement(None).folder):
            check_path(folder, mounted=profile.container is not None)
        if not stage.name.isprintable():
            raise ConfigError(f"name: {stage.name!r} cannot be the name of a job")
    if profile.kind == "local" and stage.nodes != (1, 1):
        raise ConfigError("--cluster local is this machine alone: leave --nodes out, or use 1")
    if stage.minutes * 60 <= profile.signal_delay_s:
        raise ConfigError(
            f"--time of {stage.minutes} min is not longer than the profile's signal_delay_s={profile.signal_delay_s}: "
            f"the job would be told to save as soon as it starts; use at least "
            f"{math.ceil((profile.signal_delay_s + STARTUP_S) / 60) + 1} min, or a shorter delay"
        )
    for run, loaded in zip(stage.runs, stage.loaded):
        if stage.action == "evaluate":
            continue
        if history.newest_checkpoint(run) is None:
            check_source(loaded.config, waits=waits or stage.after is not None)
        for nodes in range(stage.nodes[0], stage.nodes[1] + 1):
            try:
                derive(
                    loaded.config,
                    world=nodes * profile.tasks,
                    samples_per_epoch=loaded.config.train.global_batch,
                )
            except ConfigError as error:
                raise ConfigError(f"with {nodes} node(s) of {profile.tasks} device(s): {error}") from None
        step_s, save_s = measured(run, loaded.config.train.global_batch)
        if images_per_second is not None:
            step_s = loaded.config.train.global_batch / images_per_second
        if step_s is not None:
            _check_time(stage, step_s, save_s or 0.0)


def check_path(folder: Path, *, mounted: bool = False) -> None:
    """Refuse a path that Slurm would read as something else.

    In the names of output files it expands ``%`` and drops a backslash, and no ``#SBATCH`` line can hold a line break. A container's
    mounts (``mounted``) are divided by commas and colons.

    Raises:
        ConfigError: naming the path and the character.
    """
    for letter in str(folder):
        if letter in "%\\" or not letter.isprintable() or (mounted and letter in ",:"):
            raise ConfigError(
                f"run folder {str(folder)!r}: {letter!r} in a path does not survive "
                f"{'a list of mounts' if letter in ',:' else 'Slurm'}; choose another --run"
            )


def _check_time(stage: Stage, step_s: float, save_s: float) -> None:
    delay = stage.profile.signal_delay_s
    need = step_s + save_s
    if need > delay:
        raise ConfigError(
            f"signal_delay_s={delay} of profile {stage.profile_name} is shorter than one step ({step_s:.0f} s) and a save "
            f"({save_s:.0f} s): the job would be killed while it saves; use at least {math.ceil(need) + 1}"
        )
    if stage.minutes * 60 < STARTUP_S + step_s + delay:
        raise ConfigError(
            f"--time of {stage.minutes} min is shorter than the start ({STARTUP_S:.0f} s), one step ({step_s:.0f} s) and the "
            f"signal_delay_s={delay} in which the run is saved; use at least "
            f"{math.ceil((STARTUP_S + step_s + delay) / 60)} min"
        )


def measured(run: Path, global_batch: int) -> tuple[float | None, float | None]:
    """Seconds of a step and of a save, as an earlier attempt of this run left them; None if unknown.

    Steps by the rate in metrics.jsonl; a save by what lies between the first and the last file of a checkpoint's folder.
    """
    step_s = save_s = None
    path = run / "metrics.jsonl"
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[-500:]:
            with contextlib.suppress(ValueError):
                rate = json.loads(line).get("images_per_s")
                step_s = global_batch / rate if rate else step_s
    for manifest in run.glob("checkpoints/step_*/manifest.json"):
        times = [file.stat().st_mtime for file in manifest.parent.iterdir()]
        save_s = max(save_s or 0.0, max(times) - min(times))
    return step_s, save_s


def check_run(run: Path, loaded: Loaded) -> None:
    """Refuse to put a run into a folder that holds another one, or one that still has a job, or is trained by hand; the job's start
    asks the same.

    Raises:
        ConfigError: naming the settings that differ.
        UserError: other training data, where these can be looked at from here; or naming the job or the process.
    """
    newest = resume_rules.newest(run)
    if newest is not None:
        resume_rules.check_settings(run, loaded.config, *newest)
        data = resume_rules.look(loaded.config)
        if data is not None:
            resume_rules.check_data(run, loaded.config, *newest, data)
    known = newest is not None or (run / "config.yaml").is_file() or (run / "submit").is_dir()
    if not known and run.is_dir() and any(run.iterdir()):
        raise ConfigError(f"{run} is not empty and not a run folder; choose another --run")
    _refuse_second_job(run)
    owner.refuse_if_in_use(run)


def _refuse_second_job(run: Path) -> None:
    job, state = active(run)
    if job is not None:
        raise UserError(
            f"{run} already has job {job} ({state}); two jobs in one run folder would overwrite each other: "
            f"dattrain cancel {run} first, or choose another --run"
        )


@contextlib.contextmanager
def reserved(stages: Sequence[Stage]) -> Iterator[None]:
    """While the block prepares and submits ``stages``, no other submission does so with the same run folders.

    Raises:
        UserError: another one does, or has just done.
    """
    with contextlib.ExitStack() as stack:
        for stage in stages:
            stack.enter_context(owner.acquire(stage.placement(None).folder.parent, "submitted"))
            for run in stage.runs:
                _refuse_second_job(run)
        yield


def active(run: Path) -> tuple[str | None, str]:
    """The job of a run that is not over, and its state; no job and UNKNOWN where only Slurm could tell, and does not answer."""
    from dattrain.submit import local

    jobs = [e["job"] for e in history.history(run) if e["event"] == "submit"]
    if local.alive(run):
        return jobs[-1] if jobs else "local", "RUNNING"
    jobs = [job for job in jobs if not job.startswith("local")][-2:]
    states = queue.states(jobs)
    for job, state in states.items():
        if not state.final and state != queue.UNKNOWN:
            return job, state.state
    unknown = (
        queue.UNKNOWN in states.values()
        and run_status.judge(history.history(run), queue.UNKNOWN)[0] == "unknown"
    )
    return None, "UNKNOWN" if unknown else ""


def prepare(stage: Stage, dependents: Sequence[Path] = ()) -> None:
    """Set the run folders of a stage up: resolved config, code, and what the bookkeeper needs to know."""
    folder = stage.placement(None).folder
    for run, loaded in zip(stage.runs, stage.loaded):
        (run / "submit").mkdir(parents=True, exist_ok=True)
        write(run / "config.yaml", dump(loaded.config))
        snapshot.take(run)
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
        write(run / "submit" / "spec.json", json.dumps(spec, indent=2) + "\n")
    folder.mkdir(parents=True, exist_ok=True)


def submit(stage: Stage, dependency: str | None = None) -> list[str]:
    """Submit a prepared stage; returns one job id per run.

    Raises:
        UserError: Slurm refuses it.
    """
    if stage.profile.kind == "local":
        from dattrain.submit import local

        return [local.start(stage.runs[0], stage.profile)]
    place = stage.placement(dependency)
    jobs = [Job(str(run), stage.action) for run in stage.runs]
    ids = _submit_slurm(stage.profile, place, jobs)
    for run, job in zip(stage.runs, ids):
        history.record(run, "submit", job=job, by="user", nodes=place.nodes_text, dependency=place.dependency)
    return ids


def _submit_slurm(profile: Profile, place: Placement, jobs: Sequence[Job]) -> list[str]:
    from submitit.core.utils import DelayedSubmission

    text = slurm.script(profile, place)
    aside = place.folder / f".{secrets.token_hex(8)}"
    aside.write_text(text, encoding="utf-8")
    first, why = command.sbatch(aside, text)
    if first is None:
        aside.unlink()
        raise UserError(f"not submitted: {why}")
    aside.replace(place.folder / f"{first}_submission.sh")
    ids = [first] if len(jobs) == 1 else [f"{first}_{n}" for n in range(len(jobs))]
    for job, identity in zip(jobs, ids):
        delayed = DelayedSubmission(job)
        delayed.set_timeout(place.minutes, slurm.TIMEOUTS)
        delayed.dump(aside)
        aside.replace(place.folder / f"{identity}_submitted.pkl")
    return ids


def refuse_what_slurm_refuses(stage: Stage) -> list[str]:
    """Ask Slurm, and the batch script's Python, before anything is written. Returns what the user may not expect, a line each.

    Raises:
        UserError: what Slurm says, with the known partitions where that is the trouble.
    """
    profile = stage.profile
    if profile.kind == "local":
        return []
    why, note = queue.ask(
        slurm.script(profile, replace(stage.placement(None), dependency=None)),
        queue.Need(
            profile.partition,
            stage.nodes[0],
            profile.tasks * (profile.cpus_per_task or 1),
            stage.minutes,
            profile.reservation,
        ),
    )
    why = why or host.refusal(profile)
    if why is not None:
        raise UserError(f"profile {stage.profile_name}: {why}")
    return [note] if note else []


def overruled(stage: Stage, environ: Mapping[str, str]) -> list[str]:
    """What of this shell does not hold for the job, a line each."""
    if stage.profile.kind == "local":
        return []
    script = slurm.script(stage.profile, stage.placement(None))
    lines = []
    for variable, (option, value) in shell.overruled(environ, script).items():
        if value != environ[variable] or not option:
            holds = (
                f"the job says --{option}{'=' if value else ''}{value}"
                if option
                else "dattrain submit has its own way"
            )
            lines.append(f"{variable}={environ[variable]} of this shell is not used: {holds}")
    if environ.get("MASTER_ADDR"):
        lines.append(
            f"MASTER_ADDR={environ['MASTER_ADDR']} of this shell is not used: the job has other nodes; where it is right "
            "nevertheless, set it under environment in the profile"
        )
    return lines


def add_dependents(run: Path, waiting: Sequence[Path]) -> None:
    """Tell a run's bookkeeper of runs that were queued behind it, so that a follow-up job takes them along."""
    path = run / "submit" / "spec.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    spec["dependents"] = list(dict.fromkeys([*spec["dependents"], *map(str, waiting)]))
    write(path, json.dumps(spec, indent=2) + "\n")


def write(path: Path, text: str) -> None:
    """Write a small file at once: a reader sees the old one or the new one. What holds the secrets of a URL is its owner's."""
    write_atomically(path, text, private=mask(text) != text)
