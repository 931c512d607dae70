"""What is refused before anything is written: what would fail later, and what Slurm refuses. Reads files and asks Slurm."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from dattrain.config.derive import SAMPLES, check_early_stopping, check_source, derive
from dattrain.config.load import Loaded
from dattrain.config.schema import Config
from dattrain.data import classes
from dattrain.data.annotations.kinds import KINDS, background_hint, check_kind, learned
from dattrain.data.source.glance import glance
from dattrain.data.source.listing import is_remote
from dattrain.engine import resume_rules
from dattrain.errors import ConfigError, UserError
from dattrain.runtime import owner
from dattrain.submit import cpu_time, history, host, queue, run_status, shell, slurm
from dattrain.submit.cluster import Profile
from dattrain.submit.plan import Stage, SubmissionPlan, SubmitRequest

STARTUP_S = 15.0
"""Seconds that a job spends before its first step: imports, process group, data, checkpoint. A guess on the small side."""

CPU_DAYS = 7.0
"""Days on CPUs alone, by a bound that is on the small side, beyond which a run is refused without ``--yes``."""

NAME_BYTES = 255
"""Longest name of a file or folder, on all file systems of note."""


def check(planned: SubmissionPlan, request: SubmitRequest, *, needs_data: bool = True) -> None:
    """``check_stage`` of every stage of a request.

    Raises:
        ConfigError, UserError: as that.
    """
    for stage, need in zip(planned.stages, planned.needs):
        with named(planned, stage):
            check_stage(
                stage, request.images_per_second, waits=need is not None, yes=request.yes, needs_data=needs_data,
                prefix=f"{stage.runs[0].name}." if planned.chain else "",
            )  # fmt: skip


@contextmanager
def named(planned: SubmissionPlan, stage: Stage) -> Iterator[None]:
    """Begin the messages of what is raised inside with the stage's name, where there are others."""
    try:
        yield
    except UserError as error:
        if planned.chain is None:
            raise
        raise UserError(f"{stage.name}: {error}", exit_code=error.exit_code) from None


def _check_data_is_here(config: Config) -> None:
    """Of a job on this machine. Elsewhere a path may be one of the nodes alone."""
    for key, spec in (("data.train", config.data.train), ("data.val", config.data.val)):
        if spec and not re.search(r"[*?\[{|]|::|:/|^pipe:", spec) and not os.path.lexists(spec):
            raise UserError(f"{key}={spec}: there is no such file or folder (from {Path.cwd()})")


def _check_classes(config: Config) -> None:
    """Of training data that can be seen from here: else a job would find it out after its wait in the queue."""
    data, num_classes = config.data, config.model.num_classes
    if data.train is None or data.reader == "webdataset":
        return
    try:
        if is_remote(data.train):
            return
        found = glance(data.train)
    except UserError:
        return  # elsewhere, or not made yet
    what = f"data.train={data.train}"
    task = config.task.kind
    check_kind(found.annotations, KINDS[task], what, task)
    own = None if found.classes is None else learned(found.classes, task)
    names = None if found.classes is None or own is None else [found.classes[label] for label in own]
    hint = background_hint(found.annotations, found.classes, num_classes, task)
    known = classes.decide(names, num_classes, data.labels, what, hint=hint)
    if found.classes is None or own is None:
        classes.check_labels(found.max_label, num_classes, what)
    elif data.labels is not None:
        used = own if found.used is None else sorted({*own} & {*found.used})
        known.numbers([found.classes[label] for label in used], what)


def check_stage(
    stage: Stage, images_per_second: float | None = None, *, waits: bool = False, yes: bool = False,
    needs_data: bool = True, prefix: str = "",
) -> None:  # fmt: skip
    """Refuse what would fail later, naming the setting: what ``plan``, ``submit --dry-run`` and ``submit`` have in common.

    Args:
        images_per_second: of the whole job, measured or expected.
        waits: for another stage, which may write what this one starts from.
        yes: what is only absurd is meant.
        needs_data: False for a plan without data at hand.
        prefix: of a setting on the command line: ``STAGE.`` in a chain.

    Raises:
        ConfigError: no data, or a set that can be seen from here and has not the classes of the head; early stopping without
            evaluations, ImageNet on CPUs (without ``yes``), the batch does not divide over every number of devices that the job may get, the time limit has no
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
        for folder in (*stage.runs, stage.placement().folder):
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
        check_early_stopping(loaded.config)
        if profile.kind == "local":
            _check_data_is_here(loaded.config)
        _check_classes(loaded.config)
        samples = _samples(loaded.config)
        for nodes in range(stage.nodes[0], stage.nodes[1] + 1):
            try:
                derive(
                    loaded.config,
                    world=nodes * profile.tasks,
                    samples_per_epoch=samples or loaded.config.train.global_batch,
                )
            except ConfigError as error:
                raise ConfigError(f"with {nodes} node(s) of {profile.tasks} device(s): {error}") from None
        step_s, save_s = measured(run, loaded.config.train.global_batch)
        if images_per_second is not None:
            step_s = loaded.config.train.global_batch / images_per_second
        if step_s is not None:
            _check_time(stage, step_s, save_s or 0.0)
        if samples is not None and not yes:
            _check_cpu_time(stage, loaded.config, samples, step_s)
        if loaded.config.data.train is None and needs_data:
            raise ConfigError(f"data.train is not set: add {prefix}data.train=SHARDS")


def _samples(config: Config) -> int | None:
    """Training images of an epoch, where a glance at local shards or the label set tells."""
    try:
        parts = resume_rules.look(config)
    except UserError:
        parts = None  # what is wrong with the data is said by those who open it
    if parts:
        return sum(int(part["samples"]) for part in parts)
    # A schedule in updates is as long with any set.
    return SAMPLES.get(config.data.labels or "") or (config.schedule.updates and config.train.global_batch)


def cpu_cores(profile: Profile) -> int:
    """Cores of a CPU task: the profile's, else Slurm's default of one, or all of this machine's."""
    here = max(1, (os.cpu_count() or 1) // profile.tasks) if profile.kind == "local" else 1
    return profile.cpus_per_task or here


def _check_cpu_time(stage: Stage, config: Config, samples: int, step_s: float | None) -> None:
    """Refuse a run of more than ``CPU_DAYS`` on CPUs alone."""
    profile, nodes = stage.profile, stage.nodes[1]
    if profile.gpus_per_node:
        return
    tasks, cores = nodes * profile.tasks, cpu_cores(profile)
    found = cpu_time.bound(config, samples=samples, tasks=tasks, cores=cores)
    if found is not None and step_s is not None:
        rate = config.train.global_batch / step_s
        found = replace(found, seconds=found.images / rate, images_per_s=rate)
    if found is None or found.seconds <= CPU_DAYS * 86400:
        return
    raise ConfigError(
        f"it would train on CPUs alone (profile {stage.profile_name}, gpus_per_node=0: {nodes} node(s) x {profile.tasks} "
        f"task(s) of {cores} core(s)), which takes at least {found.words} by the plan's estimate: {found.images:,} images at "
        f"{found.images_per_s:,.3g} a second at most. Say --gpus-per-node G, or add --yes to submit it all the same"
    )


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
    """Seconds of a step and of a save in an earlier attempt of this run; None if unknown.

    Steps by the rate in metrics.jsonl; a save by what lies between the first and the last file of a checkpoint's folder.
    """
    save_s = None
    rate = run_status.read_metrics(run / "metrics.jsonl").get("images_per_s")
    for manifest in run.glob("checkpoints/step_*/manifest.json"):
        times = [file.stat().st_mtime for file in manifest.parent.iterdir()]
        save_s = max(save_s or 0.0, max(times) - min(times))
    return global_batch / rate if rate else None, save_s


def check_run(run: Path, loaded: Loaded) -> None:
    """Refuse a run folder that holds another run, still has a job, or is trained by hand; the job's start checks the same.

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
    refuse_second_job(run)
    owner.refuse_if_in_use(run)


def refuse_second_job(run: Path) -> None:
    """Refuse a run folder that still has a job.

    Raises:
        UserError: naming the job.
    """
    job, state = run_status.active_job(run)
    if job is not None:
        raise UserError(
            f"{run} already has job {job} ({state}); two jobs in one run folder would overwrite each other: "
            f"dattrain cancel {run} first, or choose another --run"
        )


def check_slurm(stage: Stage) -> list[str]:
    """Have Slurm, and the batch script's Python, looked at. Returns lines on what the user may not expect.

    Raises:
        UserError: what Slurm says, with the known partitions where that is the trouble.
    """
    profile = stage.profile
    if profile.kind == "local":
        return []
    why, note = queue.check(
        slurm.script(profile, replace(stage.placement(), dependency=None)),
        queue.Requirements(
            profile.partition,
            stage.nodes[0],
            profile.tasks * (profile.cpus_per_task or 1),
            stage.minutes,
            profile.reservation,
        ),
    )
    why = why or host.problem(profile)
    if why is not None:
        raise UserError(f"profile {stage.profile_name}: {why}")
    return [note] if note else []


def overruled(stage: Stage, environ: Mapping[str, str]) -> list[str]:
    """Lines on the variables of this shell that do not hold for the job."""
    if stage.profile.kind == "local":
        return []
    script = slurm.script(stage.profile, stage.placement())
    lines = []
    for variable, (option, value) in shell.overruled(environ, script).items():
        said = f"the job says --{option}{'=' if value else ''}{value}"
        holds = said if option else "dattrain submit has its own way"
        if value != environ[variable] or not option:
            lines.append(f"{variable}={environ[variable]} of this shell is not used: {holds}")
    if environ.get("MASTER_ADDR"):
        lines.append(
            f"MASTER_ADDR={environ['MASTER_ADDR']} of this shell is not used: the job has other nodes; where it is right "
            "nevertheless, set it under environment in the profile"
        )
    return lines
