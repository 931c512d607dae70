"""From a profile and a size to submitit's parameters and the text of a batch script. Pure: nothing is run or written.

The text comes from submitit's own generator, which is what ``sbatch`` is given too, so that what ``--dry-run`` prints is
what would be submitted.

What a job needs is said to sbatch for its nodes, and to srun for its tasks, since what srun takes over from sbatch differs
(SchedMD's CHANGELOG and the man pages of srun and sbatch, by version):

- ``--cpus-per-task``: srun of 22.05 and 23.02 reads SRUN_CPUS_PER_TASK in place of SLURM_CPUS_PER_TASK; 23.11 went back. Since 23.11
  sbatch sets SLURM_TRES_PER_TASK too, and srun ends where the two differ ("cpus-per-task set by two different environment
  variables"), as they do when the memory asked for raises the cores (mended in 24.05.2) or a site's plugin changes them. Given to
  srun, the option beats both variables in all versions.
- ``--gpus-per-task``: sbatch refuses it for a range of nodes, as it knows no number of tasks then (22.05, 23.11), and srun since 23.11
  may take the two variables that it leaves for a contradiction. So sbatch is asked for ``--gpus-per-node``, and srun alone for
  devices by the task, which also binds them (``--gpu-bind=per_task``, in newer versions ``--tres-bind``).
- ``--ntasks-per-gpu`` excludes SLURM_TRES_PER_TASK and SLURM_NTASKS_PER_NODE (23.11): tasks are counted by the node here.
- ``--cpus-per-gpu`` next to ``--cpus-per-task``: fatal since 23.11; a profile cannot say both.
- SLURM_NTASKS for a range of nodes: mended in 22.05.9; here it is worked out from the nodes that the job got. Next to it
  ``--ntasks-per-node`` is a maximum since 24.05, which comes to the same.
- ``--export=NONE`` of sbatch, and of SBATCH_EXPORT, holds for srun too, by SLURM_EXPORT_ENV, unless srun is told otherwise.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dattrain.submit import host
from dattrain.submit.cluster import Profile

TIMEOUTS = 1_000_000_000
"""submitit's ``max_num_timeout``: it counts each signal of a job shorter than ten minutes, and would end the run at three."""

SIGNALS = "TERM HUP USR1 USR2"
"""What would end the batch script's shell before the end is recorded; the tasks get signals of their own."""

ENTER = '"$DATTRAIN_RUN/submit/code/dattrain/submit/enter.py"'
"""Starts a module of the snapshot; expanded by the batch script's shell, for each run of an array."""


@dataclass(frozen=True)
class Placement:
    """How large a job is and where its files lie."""

    name: str
    runs: tuple[Path, ...]
    """Run folders, absolute; more than one makes an array."""
    folder: Path
    """Where submitit keeps scripts, pickles and per-task output."""
    nodes: tuple[int, int]
    """Fewest and most nodes; Slurm gives what it has in between, and a restart may get another number."""
    minutes: int
    dependency: str | None = None
    parallel: int | None = None
    """Most runs of an array at a time; None is all."""

    @property
    def nodes_text(self) -> str:
        """``2`` or ``2-4``, as sbatch takes it."""
        low, high = self.nodes
        return str(low) if low == high else f"{low}-{high}"


def parameters(profile: Profile, place: Placement) -> dict[str, Any]:
    """Parameters of a job for submitit; what is None is left to the cluster."""
    extra: dict[str, Any] = {}
    if place.nodes[0] != place.nodes[1]:
        extra["nodes"] = place.nodes_text
    if profile.reservation:
        extra["reservation"] = profile.reservation
    if place.dependency:
        extra["kill-on-invalid-dep"] = "yes"
    if profile.requeue == "scontrol":
        extra["requeue"] = True
    else:
        extra["no-requeue"] = True
    extra.update(profile.long_options)
    found: dict[str, Any] = {
        "job_name": place.name,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "exclude": profile.exclude,
        "time": place.minutes,
        "nodes": place.nodes[1],
        "ntasks_per_node": profile.tasks,
        "cpus_per_task": profile.cpus_per_task,
        "mem": _memory(profile.mem_gb),
        "exclusive": True if profile.exclusive else None,
        "signal_delay_s": profile.signal_delay_s,
        "dependency": place.dependency,
        "setup": _setup_lines(profile, place),
        "teardown": [
            f"DATTRAIN_STATUS=$?; trap '' {SIGNALS}",
            f'{_job_hook(profile)} end "$DATTRAIN_RUN" "$DATTRAIN_STATUS"',
        ],
        "srun_args": _srun(profile, place),
        "wckey": None,
        "array_parallelism": place.parallel or len(place.runs),
        "additional_parameters": extra,
    }
    if profile.gpus_per_node and profile.gres is None:
        found["gpus_per_node"] = _devices(profile, profile.gpus_per_node)
    return {key: value for key, value in found.items() if value is not None or key == "wckey"}


def script(profile: Profile, place: Placement) -> str:
    """The batch script, word for word as it would be submitted."""
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{python(profile, place)} -u -m submitit.core._submit {shlex.quote(str(place.folder))}"
    count = len(place.runs) if len(place.runs) > 1 else None
    return _make_sbatch_string(
        command=command, folder=place.folder, map_count=count, **parameters(profile, place)
    )


def python(profile: Profile, place: Placement) -> str:
    """The shell command that starts the snapshot's Python in a task, inside apptainer where the profile says so."""
    return f"{_interpreter(profile, place)} {ENTER}"


def _interpreter(profile: Profile, place: Placement) -> str:
    box = profile.container
    if box is None:
        return shlex.quote(profile.python or sys.executable)
    inner = shlex.quote(profile.python or "python")
    if box.runtime == "pyxis":
        return inner
    binds = [word for mount in _mounts(profile, place) for word in ("--bind", mount)]
    gpu = ["--nv"] if profile.gpus_per_node else []
    return shlex.join(["apptainer", "exec", *gpu, *binds, *box.arguments, box.image]) + " " + inner


def _setup_lines(profile: Profile, place: Placement) -> list[str]:
    """Lines before srun: the profile's own, the environment, the snapshot, and the job hook, which says whether the job may start."""
    runs = " ".join(shlex.quote(str(run)) for run in place.runs)
    lines = [f"trap : {SIGNALS}", *profile.setup] if profile.setup else []
    # What a site's lines, or the shell that submits, leave behind must not end the script where srun does not end with 0.
    lines += ["set +eu; trap - ERR"]
    lines += [f"export {key}={shlex.quote(value)}" for key, value in profile.environment.items()]
    if profile.rendezvous_suffix:
        lines.append(f"export DATTRAIN_RENDEZVOUS_SUFFIX={profile.rendezvous_suffix}")
    lines += [
        # srun's -n; what sbatch makes of a range of nodes differs.
        f"export SLURM_NTASKS=$((SLURM_JOB_NUM_NODES * {profile.tasks}))",
        "unset SLURM_TRES_PER_TASK",
        f"DATTRAIN_RUNS=({runs})",
        'export DATTRAIN_RUN="${DATTRAIN_RUNS[${SLURM_ARRAY_TASK_ID:-0}]}"',
        'export PYTHONPATH="$DATTRAIN_RUN/submit/code${PYTHONPATH:+:$PYTHONPATH}"',
        host.version_check(profile),
        # Ignored by the job hook too.
        f"trap '' {SIGNALS}",
        f'{_job_hook(profile)} begin "$DATTRAIN_RUN" || exit $?',
        f'{_job_hook(profile)} guard "$DATTRAIN_RUN" &',
        "export DATTRAIN_GUARD=$!",
        # Deferred until srun returns, and not inherited by it: the end is recorded even when the job is told to end.
        f"trap : {SIGNALS}",
    ]
    return lines


def _job_hook(profile: Profile) -> str:
    return f"{shlex.quote(host.interpreter(profile))} {ENTER} -m dattrain.submit.job_hook"


def _srun(profile: Profile, place: Placement) -> list[str]:
    # One rank that dies would leave the others waiting in a collective until the time limit.
    arguments = ["--kill-on-bad-exit=1", "--export=ALL", f"--ntasks-per-node={profile.tasks}"]
    if profile.cpus_per_task:
        arguments.append(f"--cpus-per-task={profile.cpus_per_task}")
    if profile.gpus_per_node and profile.gpu_visibility == "one":
        arguments.append(f"--gpus-per-task={_devices(profile, 1)}")
    elif profile.gpus_per_node and profile.gres is None:
        arguments.append(f"--gpus-per-node={_devices(profile, profile.gpus_per_node)}")
    arguments += profile.srun
    box = profile.container
    if box is not None and box.runtime == "pyxis":
        arguments += [
            f"--container-image={box.image}",
            f"--container-mounts={','.join(_mounts(profile, place))}",
        ]
        arguments += box.arguments
    return arguments


def _mounts(profile: Profile, place: Placement) -> list[str]:
    assert profile.container is not None
    own = [str(run) for run in place.runs]
    if not any(place.folder.is_relative_to(run) for run in place.runs):
        own.append(str(place.folder))
    return [*(mount if ":" in mount else f"{mount}:{mount}" for mount in (*own, *profile.container.mounts))]


def _devices(profile: Profile, count: int) -> str:
    return f"{profile.gpu_type}:{count}" if profile.gpu_type else str(count)


def _memory(gb: float | None) -> str | None:
    if gb is None:
        return None
    if gb == 0:
        return "0"
    return f"{int(gb)}G" if gb == int(gb) else f"{int(gb * 1024)}M"
