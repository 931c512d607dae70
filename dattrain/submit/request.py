"""What ``dattrain submit`` was asked for, as stages; then the dry run or the real one."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dattrain.config import shipped
from dattrain.config.derive import derive
from dattrain.config.load import Loaded, load
from dattrain.errors import ConfigError, UserError
from dattrain.submit import chain, cluster, slurm, submission
from dattrain.submit.cluster import Profile, minutes
from dattrain.submit.dependency import dependency_on
from dattrain.submit.submission import Stage
from dattrain.urls import mask


@dataclass(frozen=True)
class Request:
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
    array: str | None = None
    array_parallel: int | None = None
    folder: str | None = None
    images_per_second: float | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class Plan:
    """Stages in order; ``needs`` gives, by stage, the index of the one that it waits for."""

    stages: tuple[Stage, ...]
    needs: tuple[int | None, ...]
    chain: str | None = None
    root: Path | None = None
    """Folder of a chain, which holds its stages' run folders."""


def run(request: Request) -> int:
    """Check, then print or submit."""
    made = plan(request)
    after_run = None
    notes: list[str] = []
    if request.after is not None and not request.dry_run:
        dependency, after_run = dependency_on(request.after)
        made = replace(
            made,
            stages=tuple(
                replace(stage, after=dependency) if need is None else stage
                for stage, need in zip(made.stages, made.needs)
            ),
        )
        if dependency is None:
            after_run = None
            notes.append(f"--after {request.after}: it has ended well already, so nothing is waited for")
    for stage, need in zip(made.stages, made.needs):
        submission.check(stage, request.images_per_second, waits=need is not None)
    notes += [
        note for stage in made.stages for note in (*stage.notes, *submission.overruled(stage, os.environ))
    ]
    if request.dry_run:
        _note(notes)
        print(describe(made))
        return 0
    for stage in made.stages:
        for folder, loaded in zip(stage.runs, stage.loaded):
            if loaded.config.data.train is None and stage.action == "train":
                prefix = f"{folder.name}." if made.chain else ""
                raise ConfigError(f"{stage.name}: data.train is not set: add {prefix}data.train=SHARDS")
            submission.check_run(folder, loaded)
        notes += submission.refuse_what_slurm_refuses(stage)
    _note(notes)
    with submission.reserved(made.stages):
        for index, stage in enumerate(made.stages):
            waiting = [f for s, need in zip(made.stages, made.needs) if need == index for f in s.runs]
            submission.prepare(stage, waiting)
        if made.root is not None:
            _remember_chain(made)
        jobs: list[list[str]] = []
        for stage, need in zip(made.stages, made.needs):
            try:
                jobs.append(
                    submission.submit(stage, f"afterok:{jobs[need][0]}" if need is not None else None)
                )
            except UserError as error:
                if not jobs:
                    raise
                # A limit on a user's jobs meets a chain in its middle.
                behind = f" --after {_short(made.stages[need].runs[0])}" if need is not None else ""
                raise UserError(
                    f"{stage.name}: {error}. What is printed above is queued; submit the rest once Slurm takes it: "
                    f"dattrain submit {_short(stage.runs[0])}{behind}, and so on, with the same --cluster and size"
                ) from None
            for folder, job in zip(stage.runs, jobs[-1]):
                print(f"{stage.name}: job {job}, run folder {_short(folder)}")
        if after_run is not None:
            submission.add_dependents(after_run, made.stages[0].runs)
    shown = _short(
        made.root
        or (made.stages[0].runs[0] if len(made.stages[0].runs) == 1 else made.stages[0].runs[0].parent)
    )
    print(
        f"dattrain status {shown}    dattrain logs {_short(made.stages[0].runs[0])} -f    dattrain cancel {shown}"
    )
    return 0


def _note(lines: Sequence[str]) -> None:
    for line in dict.fromkeys(lines):
        print(f"dattrain submit: {line}", file=sys.stderr)


def plan(request: Request) -> Plan:
    """Stages of a request. Reads files and the shell's variables, writes nothing and asks nobody.

    Raises:
        ConfigError: anything about the recipe, the chain, the profile or the command line.
    """
    path = shipped.find(request.config, shipped.CHAINS)
    if path.is_file() and chain.is_chain(path):
        return _plan_chain(request, path)
    if path.is_dir() and (path / "chain.json").is_file():
        raise ConfigError(
            f"{path} is the folder of a chain: submit its file again, or one stage: {path}/STAGE"
        )
    size = _size(request)
    if path.is_dir():
        return _plan_continue(request, path, size)
    if request.array is None:
        loaded = load(path, request.overrides)
        folder = Path(request.folder or f"runs/{loaded.config.name}").resolve()
        return Plan((_stage(request, loaded.config.name, (folder,), (loaded,), size),), (None,))
    key, sep, values = request.array.partition("=")
    if not sep or not values:
        raise ConfigError(f"--array {request.array}: write key=v1,v2,… as in optim.lr=1e-3,5e-4")
    listed = _split(values)
    loaded_all = tuple(load(path, [*request.overrides, f"{key}={value}"]) for value in listed)
    root = Path(request.folder or f"runs/{loaded_all[0].config.name}").resolve()
    folders = tuple(root / re.sub(r"[^\w.=+-]", "_", mask(f"{key}={value}")) for value in listed)
    if len(set(folders)) < len(folders):
        raise ConfigError(f"--array {request.array}: a value is there twice")
    if _profile(request, size).kind == "local" and len(listed) > 1:
        raise ConfigError("--array needs a Slurm cluster; on --cluster local submit one run after the other")
    return Plan((_stage(request, loaded_all[0].config.name, folders, loaded_all, size),), (None,))


def _plan_continue(request: Request, folder: Path, size: Mapping[str, Any]) -> Plan:
    """The same run again: its recorded recipe, with the size and profile of this command."""
    recorded = folder / "config.yaml"
    if not recorded.is_file():
        raise ConfigError(f"{folder}: neither a recipe nor a run folder (there is no config.yaml in it)")
    if request.array is not None or request.folder is not None:
        raise ConfigError(f"{folder} is a run to be continued: leave --array and --run out")
    loaded = load(recorded, request.overrides)
    stage = _stage(request, loaded.config.name, (folder.resolve(),), (loaded,), size)
    spec = folder / "submit" / "spec.json"
    if spec.is_file() and json.loads(spec.read_text(encoding="utf-8")).get("action") == "evaluate":
        stage = replace(stage, action="evaluate")
    return Plan((stage,), (None,))


def _plan_chain(request: Request, path: Path) -> Plan:
    if request.array is not None:
        raise ConfigError("--array goes with one recipe, not with a chain")
    name = chain.read(path).name
    root = Path(request.folder or f"runs/{name}").resolve()
    read, planned = chain.plan(path, root, request.overrides)
    order = [p.name for p in planned]
    stages = []
    for one in planned:
        size = chain.settings(one.stage, _size(request))
        stage = _stage(request, f"{read.name}.{one.name}", (one.run,), (one.loaded,), size)
        if one.stage.evaluate is not None:
            stage = replace(stage, action="evaluate")
        if one.stage.needs is not None:
            stage = replace(stage, after=None)
        stages.append(stage)
    if any(stage.profile.kind == "local" for stage in stages) and len(stages) > 1:
        raise ConfigError(
            "a chain needs a Slurm cluster; on --cluster local submit its recipes one after the other"
        )
    needs = tuple(order.index(one.stage.needs) if one.stage.needs else None for one in planned)
    return Plan(tuple(stages), needs, read.name, root)


def _size(request: Request) -> dict[str, Any]:
    return {
        "nodes": request.nodes,
        "gpus_per_node": request.gpus_per_node,
        "time": request.time,
        "retries": request.retries,
    }


def _profile(request: Request, size: Mapping[str, Any]) -> Profile:
    given = {"gpus_per_node": size["gpus_per_node"], "time": size["time"], "partition": request.partition}
    return cluster.load(request.cluster, {key: value for key, value in given.items() if value is not None})


def _stage(
    request: Request,
    name: str,
    folders: tuple[Path, ...],
    loaded: tuple[Loaded, ...],
    size: Mapping[str, Any],
) -> Stage:
    profile, notes = cluster.from_shell(_profile(request, size), os.environ)
    if size["retries"] < 0:
        raise ConfigError(f"--retries {size['retries']}: 0 or more")
    if request.array_parallel is not None and (request.array is None or request.array_parallel < 1):
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
        nodes=submission.nodes_range(str(size["nodes"])),
        minutes=minutes(profile.time),
        retries=size["retries"],
        after=dependency,
        parallel=request.array_parallel,
        notes=tuple(notes),
    )


def describe(made: Plan) -> str:
    """The plan in words and the batch scripts, as ``--dry-run`` prints them."""
    blocks = []
    for stage, need in zip(made.stages, made.needs):
        waits = (
            f", after {made.stages[need].name}"
            if need is not None
            else (f", {stage.after}" if stage.after else "")
        )
        low, high = stage.nodes
        tasks = stage.profile.tasks
        lines = [
            f"{stage.name}: {low if low == high else f'{low}-{high}'} node(s) x {tasks} task(s), "
            f"{stage.minutes} min a job, profile {stage.profile_name}{waits}"
        ]
        for folder, loaded in zip(stage.runs, stage.loaded):
            config = loaded.config
            lines.append(f"  run folder {_short(folder)}")
            if stage.action == "train":
                world = high * tasks
                made_of = derive(config, world=world, samples_per_epoch=config.train.global_batch)
                lines.append(
                    f"  batch {config.train.global_batch} = {world} device(s) x {config.train.micro_batch} x "
                    f"{made_of.accumulation} accumulated; peak learning rate {made_of.peak_lr:g}; "
                    f"{config.schedule.epochs:g} epochs"
                )
        lines.append(
            f"  saves {stage.profile.signal_delay_s} s before the limit and goes on by "
            f"{'scontrol requeue' if stage.profile.requeue == 'scontrol' else 'a follow-up job'}; "
            f"{stage.retries} crash(es) forgiven, each only after a new checkpoint"
        )
        if stage.profile.kind == "slurm":
            dependency = f"afterok:<job of {made.stages[need].name}>" if need is not None else None
            lines += ["", slurm.script(stage.profile, stage.placement(dependency)).rstrip()]
        else:
            lines.append("  through submitit's local executor, on this machine")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _remember_chain(made: Plan) -> None:
    assert made.root is not None
    content = {
        "name": made.chain,
        "stages": [{"name": stage.runs[0].name, "run": str(stage.runs[0])} for stage in made.stages],
    }
    submission.write(made.root / "chain.json", json.dumps(content, indent=2) + "\n")


def _split(values: str) -> list[str]:
    """Commas divide values, but not within brackets: ``[1,2],[3,4]`` is two."""
    parts, depth, start = [], 0, 0
    for position, letter in enumerate(values):
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            parts.append(values[start:position])
            start = position + 1
    return [part.strip() for part in [*parts, values[start:]] if part.strip()]


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def folders_of(given: Sequence[str]) -> list[Path]:
    """Run folders under each given one: itself, the stages of a chain, the runs of an array, or all below a parent.

    Raises:
        ConfigError: there is none.
    """
    found: list[Path] = []
    for name in given:
        folder = Path(name)
        if (folder / "submit" / "history.jsonl").is_file() or (folder / "config.yaml").is_file():
            found.append(folder)
        elif (folder / "chain.json").is_file():
            stages = json.loads((folder / "chain.json").read_text(encoding="utf-8"))["stages"]
            found += [folder / stage["name"] for stage in stages]
        else:
            below = sorted(
                {p.parent for pattern in ("*/config.yaml", "*/*/config.yaml") for p in folder.glob(pattern)}
            )
            if not below:
                raise ConfigError(f"{folder}: no run folder, and none below it")
            found += below
    return found
