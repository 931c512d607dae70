"""Cluster profiles: the settings of a cluster, once, so that a submission names the profile and the size alone.

A profile is a YAML file found by name in ``$XDG_CONFIG_HOME/dattrain/clusters`` (``~/.config`` by default), then among
those shipped in ``launch/clusters``; anything with a slash or a ``.yaml`` ending is a path.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dattrain.config.explain import explain
from dattrain.config.shipped import CLUSTERS
from dattrain.errors import ConfigError
from dattrain.submit import shell

Count = Annotated[int, Field(ge=1)]

OWNED = {
    **dict.fromkeys(
        ("partition", "account", "qos", "constraint", "exclude", "reservation", "time", "exclusive", "requeue"),
        "the profile's key of that name",
    ),
    "no-requeue": "requeue",
    "signal": "signal_delay_s",
    "nodes": "--nodes",
    "ntasks": "tasks_per_node, or gpus_per_node",
    "ntasks-per-node": "tasks_per_node, or gpus_per_node",
    "ntasks-per-gpu": "gpus_per_node, of which each has one task",
    "ntasks-per-tres": "gpus_per_node, of which each has one task",
    "gpus": "gpus_per_node and gpu_type",
    "gpus-per-node": "gpus_per_node and gpu_type",
    "gpus-per-socket": "gpus_per_node and gpu_type",
    "gpus-per-task": "gpus_per_node, gpu_type and gpu_visibility",
    "tres-per-task": "gpus_per_node and cpus_per_task",
    "cpus-per-task": "cpus_per_task",
    "mem": "mem_gb, which may be all",
    "array": "--array and --array-parallel",
    "dependency": "--after",
    "clusters": "SLURM_CLUSTERS in the shell, which squeue and scancel read too",
    **dict.fromkeys(
        ("job-name", "output", "error", "open-mode", "wait", "parsable", "test-only"), "for dattrain submit itself to say"
    ),
}  # fmt: skip
"""sbatch's options that a profile's ``sbatch`` cannot say, with what says them."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Container(_Section):
    """Where the tasks run. The batch script itself stays on the host, where ``scontrol`` and ``sbatch`` are."""

    runtime: Literal["pyxis", "apptainer"]
    """``pyxis`` is srun's ``--container-image`` (enroot); ``apptainer`` also stands for singularity."""
    image: str
    mounts: tuple[str, ...] = ()
    """``host`` or ``host:container``; the run folder, its snapshot and the submission's folder are always mounted."""
    arguments: tuple[str, ...] = ()
    """Further arguments: of srun for pyxis (``--no-container-mount-home``), of ``apptainer exec`` for apptainer."""


class Profile(_Section):
    """One cluster. What is None is left to the cluster's own default."""

    kind: Literal["slurm", "local"] = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    """Nodes that are never used, in Slurm's notation (``n[1-3],n7``)."""
    reservation: str | None = None
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    """Devices per node, and one task for each of them; 0 trains on CPUs over gloo."""
    gpu_type: Annotated[str, Field(pattern=r"^[\w.+-]+$")] | None = None
    """Slurm's name of the devices, where a cluster has several or asks for it (``a100``)."""
    gpu_visibility: Literal["all", "one"] = "all"
    """``all``: each task sees its node's devices; ``one``: its own (srun's ``--gpus-per-task=1``)."""
    tasks_per_node: Count | None = None
    """Tasks of a node without devices; with devices it is ``gpus_per_node``."""
    cpus_per_task: Count | None = None
    """Cores of a task: its data workers and itself."""
    mem_gb: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Memory of a node; 0, or ``all``, is all that it has (sbatch's ``--mem=0``)."""
    exclusive: bool = False
    time: str = "24:00:00"
    """Time limit of one job, in Slurm's notation; a run takes as many jobs as it needs."""
    signal_delay_s: Count = 120
    """Seconds before the time limit at which the job is told to save."""
    requeue: Literal["scontrol", "follow-up"] = "scontrol"
    """``scontrol`` requeues the same job; ``follow-up`` queues the next job beforehand, behind the present one's failure."""
    setup: tuple[str, ...] = ()
    """Shell lines that run on the first node before anything else (``module load cuda``)."""
    environment: dict[str, str] = {}
    """Exported to every task (``NCCL_SOCKET_IFNAME: ib0``)."""
    rendezvous_suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]+$")] | None = None
    """Put behind the short name of the first node where ranks do not reach each other by that name: ``i`` makes jwb0001 jwb0001i,
    ``.cluster.local`` makes n1 n1.cluster.local. ``MASTER_ADDR`` in ``environment`` is one fixed address instead."""
    container: Container | None = None
    sbatch: dict[str, str | int | bool] = {}
    """Further sbatch options by their long names: ``switches: 1``; ``true`` for one without a value."""
    srun: tuple[str, ...] = ()
    """Further arguments of srun: ``--cpu-bind=none``."""
    python: str | None = None
    """Python of the tasks; by default the one that submits, or ``python`` in a container."""
    host_python: str | None = None
    """Any Python >= 3.8 of the node's own; it runs the job hook, with the standard library alone. By default that of
    the tasks, or the one that submits where they run in a container."""

    @field_validator("time")
    @classmethod
    def _time(cls, value: str) -> str:
        minutes(value)
        return value

    @field_validator("time", mode="before")
    @classmethod
    def _time_as_text(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            # YAML 1.1 reads an unquoted 24:00:00 as a number in base 60, and so may have lost what was written.
            raise ValueError("put the time in quotes, since YAML reads 24:00:00 as the number 86400")
        return value

    @field_validator("gpus_per_node", mode="before")
    @classmethod
    def _count_alone(cls, value: Any) -> Any:
        match = re.fullmatch(r"(?:gpu:)?(?:([\w.+-]+):)?(\d+)", value) if isinstance(value, str) else None
        if match and not value.isdigit():
            named = f" and gpu_type: {match[1]}" if match[1] else ""
            raise ValueError(f"write gpus_per_node: {match[2]}{named}")
        return value

    @field_validator("mem_gb", mode="before")
    @classmethod
    def _all_memory(cls, value: Any) -> Any:
        return 0 if value == "all" else value

    @field_validator("setup")
    @classmethod
    def _no_options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for line in "\n".join(value).splitlines():
            if line.startswith("#SBATCH"):
                raise ValueError(
                    f"sbatch reads no {line!r} behind the first command: put it under sbatch, without the dashes"
                )
        return value

    @field_validator("environment", mode="before")
    @classmethod
    def _text_values(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {
                key: str(v) if isinstance(v, int | float) and not isinstance(v, bool) else v
                for key, v in value.items()
            }
        return value

    @field_validator("environment")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        for key in value:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
                raise ValueError(f"{key!r} is not the name of an environment variable")
        return value

    @field_validator("sbatch")
    @classmethod
    def _not_twice(cls, value: dict[str, Any]) -> dict[str, Any]:
        clash = sorted(key for key in value if key.replace("_", "-") in OWNED)
        if clash:
            ways = "; ".join(f"{key} is {OWNED[key.replace('_', '-')]}" for key in clash)
            raise ValueError(f"{', '.join(clash)} has a setting of its own ({ways})")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Profile:
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"tasks_per_node={self.tasks_per_node} with gpus_per_node={self.gpus_per_node}: there is one task per "
                "device; leave tasks_per_node out"
            )
        if self.gpu_type is not None and not self.gpus_per_node:
            raise ValueError(f"gpu_type: {self.gpu_type} without gpus_per_node: say how many")
        if self.gres is not None and self.gpus_per_node:
            asked = _devices(self.gres)
            if asked != self.gpus_per_node or self.gpu_type is not None:
                raise ValueError(
                    f"sbatch: gres: {self.gres} asks for {asked} device(s) of a node, next to gpus_per_node="
                    f"{self.gpus_per_node}, gpu_type={self.gpu_type}: leave gres out, or let the numbers agree without a gpu_type"
                )
        rivals = {"mem_gb": ("mem-per-cpu", "mem-per-gpu"), "cpus_per_task": ("cpus-per-gpu",)}
        for key, others in rivals.items():
            for other in others:
                if getattr(self, key) is not None and other in self.long_options:
                    raise ValueError(f"{key} and sbatch: {other} exclude each other in Slurm: keep one")
        if self.kind == "local" and self.container is not None:
            raise ValueError("container is for kind: slurm; start dattrain inside the container instead")
        return self

    @property
    def long_options(self) -> dict[str, str | int | bool]:
        """``sbatch``, as Slurm writes the names; without those that are false."""
        return {key.replace("_", "-"): value for key, value in self.sbatch.items() if value is not False}

    @property
    def gres(self) -> str | None:
        """``gres`` of ``sbatch`` where it names the devices, as some sites demand; it then stands for ``--gpus-per-node``."""
        text = str(self.long_options.get("gres", ""))
        return text if _devices(text) else None

    @property
    def tasks(self) -> int:
        """Tasks of one node."""
        return self.gpus_per_node or self.tasks_per_node or 1


def _devices(gres: str) -> int:
    """Devices in sbatch's ``--gres``: ``gpu``, ``gpu:4``, ``gpu:a100:4``, ``gpu:a100:2,gpu:h100:2,nvme:1``."""
    parts = [part.split(":") for part in gres.split(",")]
    return sum(
        int(part[-1]) if part[-1].isdigit() else 1 for part in parts if part[0].removeprefix("gres/") == "gpu"
    )


def minutes(text: str) -> int:
    """Minutes, rounded up, of a time in Slurm's notation: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S.

    Raises:
        ValueError: it is none of these, or zero.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a time; write minutes, H:MM:SS, or D-HH:MM:SS")
    days, a, b, c = (int(part) if part is not None else None for part in match.groups())
    assert a is not None
    if days is not None:
        seconds = days * 86400 + a * 3600 + (b or 0) * 60 + (c or 0)
    elif c is not None:
        seconds = a * 3600 + (b or 0) * 60 + c
    else:
        seconds = a * 60 + (b or 0)
    if seconds <= 0:
        raise ValueError(f"{text!r} is no time at all; a time limit is at least a minute")
    return -(-seconds // 60)


def user_folder() -> Path:
    """Where the user keeps profiles of their own."""
    # Path.home() raises for a user without a home folder and an entry in passwd, as containers have.
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(base) / "dattrain" / "clusters"


def find(name: str) -> Path:
    """The file of a profile.

    Raises:
        ConfigError: there is none; the nearest name is offered, or all of them.
    """
    if "/" in name or name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"--cluster {name}: no such file")
        return path
    folders = (user_folder(), CLUSTERS)
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    hint = f"did you mean {near[0]}" if near else f"known: {', '.join(known) or 'none'}"
    raise ConfigError(f"--cluster {name}: no such profile; {hint}. Your own go to {user_folder()}/NAME.yaml")


def load(name: str, overrides: Mapping[str, Any] | None = None) -> Profile:
    """Read and check a profile; ``overrides`` are settings given on the command line.

    Raises:
        ConfigError: naming the file, the key and the value; an unknown key comes with the nearest known one.
    """
    path = find(name)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a profile is a mapping of settings, not a {type(raw).__name__}")
    try:
        return Profile.model_validate({**raw, **(overrides or {})})
    except ValidationError as error:
        raise ConfigError(explain(error, Profile, str(path))) from None


def from_shell(profile: Profile, environ: Mapping[str, str]) -> tuple[Profile, list[str]]:
    """Fill what the profile (and the command line) leaves open from the shell's ``SBATCH_`` variables. Returns a line for each, too.

    It becomes a part of the profile, so that the script says it: a follow-up job is submitted from a node, whose shell may not
    have the variable.

    Raises:
        ConfigError: naming the variable.
    """
    taken = {
        key: (variable, environ[variable])
        for variable, key in shell.SETTINGS.items()
        if environ.get(variable) and (key not in profile.model_fields_set or getattr(profile, key) is None)
    }
    if profile.kind != "slurm" or not taken:
        return profile, []
    values = {key: value for key, (_, value) in taken.items()}
    try:
        made = Profile.model_validate({**profile.model_dump(exclude_unset=True), **values})
    except ValidationError as error:
        raise ConfigError(explain(error, Profile, "SBATCH_ variables of this shell")) from None
    return made, [
        f"{key}={value} comes from {variable} of this shell" for key, (variable, value) in taken.items()
    ]
