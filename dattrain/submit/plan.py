"""From the command line of ``dattrain submit`` to stages. Pure but for reading files: writes nothing and asks Slurm nothing.

Not here: the text of a batch script (``slurm``), what is refused before anything is written (``checks``), and the submission
itself (``submission``).
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dattrain.config import shipped
from dattrain.config.derive import derive
from dattrain.config.load import Loaded, load
from dattrain.config.run import check_folder_name
from dattrain.errors import ConfigError
from dattrain.files import shown
from dattrain.submit import array, chain, cluster, slurm
from dattrain.submit.cluster import Profile, minutes
from dattrain.submit.dependency import dependency_on
from dattrain.submit.slurm import Placement


@dataclass(frozen=True)
class SubmitRequest:
    """The command line of ``dattrain submit``."""

    config: str
    overrides: tuple[str, ...] = ()
    cluster: str = "generic"
    nodes: str = "1"
    gpus_per_node: int | None = None
    partition: str | None = None
    time: str | None = None
    retries: int = 3
    after: str | None = None
    array: tuple[str, ...] = ()
    """``key=v1,v2`` words; their product is the runs."""
    array_parallel: int | None = None
    folder: str | Path | None = None
    images_per_second: float | None = None
    dry_run: bool = False
    yes: bool = False
    """Take what would otherwise be refused as absurd."""


@dataclass(frozen=True)
class Stage:
    """One run (or an array of runs, alike but for a few settings) with its size."""

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
    """Lines on what the user may not expect."""

    def placement(self, dependency: str | None = None) -> Placement:
        """Size of its job and where the job's files lie; ``dependency`` in sbatch's notation."""
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


@dataclass(frozen=True)
class SubmissionPlan:
    """Stages in order; ``needs`` gives, by stage, the index of the one that it waits for."""

    stages: tuple[Stage, ...]
    needs: tuple[int | None, ...]
    chain: str | None = None
    root: Path | None = None
    """Folder of a chain; it holds its stages' run folders."""

    @property
    def runs(self) -> list[Path]:
        """All run folders, in order."""
        return [run for stage in self.stages for run in stage.runs]


def plan(request: SubmitRequest) -> SubmissionPlan:
    """Make the stages of a request. Reads files and the shell's variables.

    Raises:
        ConfigError: anything about the recipe, the chain, the profile or the command line.
    """
    if request.folder is not None:
        check_folder_name(Path(request.folder))
    path = shipped.find(request.config, shipped.CHAINS)
    if path.is_file() and chain.is_chain(path):
        return _plan_chain(request, path)
    path = shipped.find(request.config)
    if path.is_dir() and (path / "chain.json").is_file():
        raise ConfigError(
            f"{path} is the folder of a chain: submit its file again, or one stage: {path}/STAGE"
        )
    if path.is_dir():
        return _plan_resume(request, path)
    if not request.array:
        loaded = load(path, request.overrides)
        folder = Path(request.folder or f"runs/{loaded.config.name}").resolve()
        return SubmissionPlan((_stage(request, loaded.config.name, (folder,), (loaded,)),), (None,))
    chosen = array.combinations(request.array)
    loaded_all = tuple(load(path, [*request.overrides, *own]) for own in chosen)
    root = Path(request.folder or f"runs/{loaded_all[0].config.name}").resolve()
    folders = tuple(root / name for name in array.names(chosen))
    return SubmissionPlan((_stage(request, loaded_all[0].config.name, folders, loaded_all),), (None,))


def _plan_resume(request: SubmitRequest, folder: Path) -> SubmissionPlan:
    """Plan the same run again: its recorded recipe, with the size and profile of this command."""
    recorded = folder / "config.yaml"
    if not recorded.is_file():
        raise ConfigError(f"{folder}: neither a recipe nor a run folder (there is no config.yaml in it)")
    if request.array or request.folder is not None:
        raise ConfigError(f"{folder} is a run to be continued: leave --array and --run out")
    loaded = load(recorded, request.overrides)
    stage = _stage(request, loaded.config.name, (folder.resolve(),), (loaded,))
    spec = folder / "submit" / "spec.json"
    if spec.is_file() and json.loads(spec.read_text(encoding="utf-8")).get("action") == "evaluate":
        stage = replace(stage, action="evaluate")
    return SubmissionPlan((stage,), (None,))


def _plan_chain(request: SubmitRequest, path: Path) -> SubmissionPlan:
    if request.array:
        raise ConfigError("--array goes with one recipe, not with a chain")
    read = chain.read(path)
    root = Path(request.folder or f"runs/{read.name}").resolve()
    resolved = chain.resolve(read, path, root, request.overrides)
    order = [one.name for one in resolved]
    stages = []
    for one in resolved:
        # A stage's own size counts, not the command line's.
        stage = _stage(
            replace(request, **one.stage.size), f"{read.name}.{one.name}", (one.run,), (one.loaded,)
        )
        if one.stage.evaluate is not None:
            stage = replace(stage, action="evaluate")
        if one.stage.needs is not None:
            stage = replace(stage, after=None)
        stages.append(stage)
    needs = tuple(order.index(one.stage.needs) if one.stage.needs else None for one in resolved)
    return SubmissionPlan(tuple(stages), needs, read.name, root)


def _profile(request: SubmitRequest) -> Profile:
    given = {"gpus_per_node": request.gpus_per_node, "time": request.time, "partition": request.partition}
    return cluster.load(request.cluster, {key: value for key, value in given.items() if value is not None})


def _stage(request: SubmitRequest, name: str, folders: tuple[Path, ...], loaded: tuple[Loaded, ...]) -> Stage:
    profile, notes = cluster.from_shell(_profile(request), os.environ)
    if request.retries < 0:
        raise ConfigError(f"--retries {request.retries}: 0 or more")
    if request.array_parallel is not None and profile.kind == "local":
        raise ConfigError(
            "--array-parallel: on --cluster local the runs of an array follow one another; leave it out"
        )
    if request.array_parallel is not None and (not request.array or request.array_parallel < 1):
        raise ConfigError(
            f"--array-parallel {request.array_parallel}: 1 or more runs of an --array at a time"
        )
    if request.after is not None and profile.kind == "local":
        raise ConfigError("--after needs a Slurm cluster")
    dependency = dependency_on(request.after, ask=False)[0] if request.after is not None else None
    return Stage(
        name=name,
        runs=folders,
        loaded=loaded,
        profile=profile,
        profile_name=request.cluster,
        nodes=nodes_range(request.nodes),
        minutes=minutes(profile.time),
        retries=request.retries,
        after=dependency,
        parallel=request.array_parallel,
        notes=tuple(notes),
    )


def nodes_range(text: str) -> tuple[int, int]:
    """Fewest and most nodes of ``2`` or ``2-4``.

    Raises:
        ConfigError: it is neither.
    """
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    low, high = (int(match.group(1)), int(match.group(2) or match.group(1))) if match else (0, 0)
    if not 1 <= low <= high:
        raise ConfigError(f"--nodes {text}: write a number of nodes, or fewest-most as in 2-4")
    return low, high


def describe(planned: SubmissionPlan) -> str:
    """Text of a plan and its batch scripts, as ``--dry-run`` prints them."""
    blocks = []
    for stage, need in zip(planned.stages, planned.needs):
        waits = (
            f", after {planned.stages[need].name}"
            if need is not None
            else (f", {stage.after}" if stage.after else "")
        )
        low, high = stage.nodes
        tasks = stage.profile.tasks
        lines = [
            f"{stage.name}: {low if low == high else f'{low}-{high}'} node(s) x {tasks} task(s), "
            f"{_limit(stage)}profile {stage.profile_name}{waits}"
        ]
        for folder, loaded in zip(stage.runs, stage.loaded):
            config = loaded.config
            lines.append(f"  run folder {shown(folder)}")
            if stage.action == "train":
                world = high * tasks
                derived = derive(config, world=world, samples_per_epoch=config.train.global_batch)
                passes = f"{derived.micro_batch} x {derived.accumulation} accumulated"
                if config.train.micro_batch == "auto":
                    passes = f"{derived.micro_batch}, as many at a time as fit"
                lines.append(
                    f"  batch {config.train.global_batch} = {world} device(s) x {passes}; peak learning rate {derived.peak_lr:g}; "
                    f"{config.schedule.length}"
                )
        forgiven = f"{stage.retries} crash(es) forgiven, each only after a new checkpoint"
        if stage.profile.kind == "slurm":
            how = "scontrol requeue" if stage.profile.requeue == "scontrol" else "a follow-up job"
            lines.append(
                f"  saves {stage.profile.signal_delay_s} s before the limit and resumes by {how}; {forgiven}"
            )
            dependency = f"afterok:<job of {planned.stages[need].name}>" if need is not None else None
            lines += ["", slurm.script(stage.profile, stage.placement(dependency)).rstrip()]
        else:
            alone = len(planned.runs) == 1
            turns = "" if alone else f", one after the other (this is {_turns(planned, stage)})"
            lines.append(
                f"  on this machine{turns}; a supervisor in the background starts it again; {forgiven}"
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _turns(planned: SubmissionPlan, stage: Stage) -> str:
    first = planned.runs.index(stage.runs[0]) + 1
    last = first + len(stage.runs) - 1
    return f"{first if first == last else f'{first} to {last}'} of {len(planned.runs)}"


def _limit(stage: Stage) -> str:
    """Time limit of a job; nothing for a run on this machine under the year that the profile ``local`` gives it."""
    if stage.profile.kind == "local" and stage.minutes >= 365 * 24 * 60:
        return ""
    return f"{stage.minutes} min {'a job' if stage.profile.kind == 'slurm' else 'an attempt'}, "
