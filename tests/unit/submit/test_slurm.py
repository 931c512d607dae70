"""The batch script, word for word, for each kind of profile."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from dattrain.config.shipped import CLUSTERS
from dattrain.submit import cluster, slurm
from dattrain.submit.cluster import Container, Profile
from dattrain.submit.slurm import Placement

PLACE = Placement("demo", (Path("/r/demo"),), Path("/r/demo/submit/slurm"), (2, 2), 60)


def _script(profile: Profile, place: Placement = PLACE) -> list[str]:
    return slurm.script(profile, place).splitlines()


def test_cpu_profile_word_for_word() -> None:
    profile = Profile(
        tasks_per_node=2, cpus_per_task=3, mem_gb=1.5, python="/env/bin/python", partition="main"
    )
    assert (
        slurm.script(profile, PLACE).rstrip()
        == """\
#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=3
#SBATCH --error=/r/demo/submit/slurm/%j_0_log.err
#SBATCH --job-name=demo
#SBATCH --mem=1536M
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --open-mode=append
#SBATCH --output=/r/demo/submit/slurm/%j_0_log.out
#SBATCH --partition=main
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=60

# setup
set +eu; trap - ERR
export SLURM_NTASKS=$((SLURM_JOB_NUM_NODES * 2))
unset SLURM_TRES_PER_TASK
DATTRAIN_RUNS=(/r/demo)
export DATTRAIN_RUN="${DATTRAIN_RUNS[${SLURM_ARRAY_TASK_ID:-0}]}"
export PYTHONPATH="$DATTRAIN_RUN/submit/code${PYTHONPATH:+:$PYTHONPATH}"
/env/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null || { echo "dattrain: $(hostname) has no \
Python 3.8 or newer at "/env/bin/python" ($(/env/bin/python -V 2>&1 | head -n 1)); set host_python in the profile to one" >&2; exit 1; }
trap '' TERM HUP USR1 USR2
/env/bin/python "$DATTRAIN_RUN/submit/code/dattrain/submit/enter.py" -m dattrain.submit.job_hook begin "$DATTRAIN_RUN" || exit $?
/env/bin/python "$DATTRAIN_RUN/submit/code/dattrain/submit/enter.py" -m dattrain.submit.job_hook guard "$DATTRAIN_RUN" &
export DATTRAIN_GUARD=$!
trap : TERM HUP USR1 USR2

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /r/demo/submit/slurm/%j_%t_log.out --error /r/demo/submit/slurm/%j_%t_log.err --kill-on-bad-exit=1 \
--export=ALL --ntasks-per-node=2 --cpus-per-task=3 /env/bin/python "$DATTRAIN_RUN/submit/code/dattrain/submit/enter.py" -u -m submitit.core._submit /r/demo/submit/slurm


# teardown
DATTRAIN_STATUS=$?; trap '' TERM HUP USR1 USR2
/env/bin/python "$DATTRAIN_RUN/submit/code/dattrain/submit/enter.py" -m dattrain.submit.job_hook end "$DATTRAIN_RUN" "$DATTRAIN_STATUS"\
""".replace("\\\n", "")
    )


@dataclass(frozen=True)
class Rule:
    """What Slurm documents of some versions, and what the text must (not) say for it: options of sbatch and srun, other lines."""

    why: str
    profile: Profile
    sbatch: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    """Options that neither has."""
    nodes: tuple[int, int] = (2, 2)


RULES = [
    Rule(
        "22.05, 23.02: srun does not take --cpus-per-task over from sbatch; 23.11: it ends where two variables say it differently",
        Profile(tasks_per_node=2, cpus_per_task=7),
        sbatch=("--cpus-per-task=7",),
        srun=("--cpus-per-task=7",),
        lines=("unset SLURM_TRES_PER_TASK",),
    ),
    Rule(
        "23.11: a number of cores that a site's plugin gave is not said by us",
        Profile(tasks_per_node=2),
        lines=("unset SLURM_TRES_PER_TASK",),
        never=("--cpus-per-task",),
    ),
    Rule(
        "22.05, 23.11: --gpus-per-task of sbatch needs a number of tasks, which a range of nodes has not",
        Profile(gpus_per_node=8, gpu_visibility="one"),
        sbatch=("--gpus-per-node=8", "--ntasks-per-node=8", "--nodes=2-4"),
        srun=("--ntasks-per-node=8", "--gpus-per-task=1"),
        lines=("export SLURM_NTASKS=$((SLURM_JOB_NUM_NODES * 8))",),
        never=("--ntasks-per-gpu", "--tres-per-task", "--gpu-bind"),
        nodes=(2, 4),
    ),
    Rule(
        "all: every task sees its node's devices",
        Profile(gpus_per_node=8),
        sbatch=("--gpus-per-node=8",),
        srun=("--gpus-per-node=8",),
        never=("--gpus-per-task", "--gres"),
    ),
    Rule(
        "all: typed devices; named with and without the type they are refused",
        Profile(gpus_per_node=4, gpu_type="a100", gpu_visibility="one"),
        sbatch=("--gpus-per-node=a100:4", "--ntasks-per-node=4"),
        srun=("--gpus-per-task=a100:1",),
    ),
    Rule(
        "all: a site that wants --gres gets that alone",
        Profile(gpus_per_node=4, sbatch={"gres": "gpu:a100:4,nvme:1"}),
        sbatch=("--gres=gpu:a100:4,nvme:1", "--ntasks-per-node=4"),
        never=("--gpus-per-node", "--gpus-per-task"),
    ),
    Rule("all: --mem=0 is all of a node", Profile(mem_gb=0), sbatch=("--mem=0",)),
    Rule(
        "all: --export=NONE of sbatch is srun's too by SLURM_EXPORT_ENV, unless srun is told; what the profile tells comes last",
        Profile(sbatch={"export": "NONE"}, srun=("--export=ALL,A=b",)),
        sbatch=("--export=NONE",),
        srun=("--export=ALL", "--export=ALL,A=b"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=range(len(RULES)))
def test_the_text_holds_on_each_slurm(rule: Rule) -> None:
    lines = _script(rule.profile, replace(PLACE, nodes=rule.nodes))
    asked = ["".join(shlex.split(line[8:])) for line in lines if line.startswith("#SBATCH ")]
    (command,) = [line for line in lines if line.startswith("srun ")]
    srun = shlex.split(command)
    assert set(rule.sbatch) <= set(asked)
    assert [word for word in srun if word in rule.srun] == list(rule.srun)
    assert set(rule.lines) <= set(lines[: lines.index(command)])
    assert not [word for word in (*asked, *srun) if word.partition("=")[0] in rule.never]


def test_follow_up_profile_is_never_requeued_by_slurm() -> None:
    lines = _script(Profile(requeue="follow-up"))
    assert "#SBATCH --no-requeue" in lines
    assert "#SBATCH --requeue" not in lines


def test_everything_a_site_may_ask_for() -> None:
    profile = Profile(
        account="a", qos="q", constraint="h100&ib", exclude="n[1-3]", reservation="res", exclusive=True,
        setup=("module load x",), environment={"NCCL_SOCKET_IFNAME": "ib0", "B": "a b"},
        sbatch={"switches": "1@30", "spread_job": True, "licenses": False}, srun=("--cpu-bind=none",),
    )  # fmt: skip
    lines = _script(profile)
    for line in (
        "#SBATCH --account=a", "#SBATCH --qos=q", "#SBATCH --constraint='h100&ib'", "#SBATCH --exclude='n[1-3]'",
        "#SBATCH --reservation=res", "#SBATCH --exclusive", "#SBATCH --switches=1@30", "#SBATCH --spread-job",
        "module load x", "export NCCL_SOCKET_IFNAME=ib0", "export B='a b'",
    ):  # fmt: skip
        assert line in lines, line
    assert not any("licenses" in line for line in lines)
    (srun,) = [line for line in lines if line.startswith("srun")]
    assert "--ntasks-per-node=1 --cpu-bind=none" in srun
    assert (
        lines.index("module load x")
        < lines.index("export B='a b'")
        < lines.index("trap '' TERM HUP USR1 USR2")
    )


def test_pyxis_and_apptainer_run_the_tasks_but_not_the_job_hook() -> None:
    box = Container(
        runtime="pyxis", image="/i.sqsh", mounts=("/data", "/a:/b"), arguments=("--no-container-mount-home",)
    )
    (srun,) = [line for line in _script(Profile(container=box)) if line.startswith("srun")]
    assert (
        "--container-image=/i.sqsh --container-mounts=/r/demo:/r/demo,/data:/data,/a:/b --no-container-mount-home"
        in srun
    )
    assert srun.endswith(f" python {slurm.ENTER} -u -m submitit.core._submit /r/demo/submit/slurm")

    box = replace_box(box, runtime="apptainer", arguments=("--cleanenv",))
    lines = _script(Profile(container=box, gpus_per_node=2))
    (srun,) = [line for line in lines if line.startswith("srun")]
    assert (
        "apptainer exec --nv --bind /r/demo:/r/demo --bind /data:/data --bind /a:/b --cleanenv /i.sqsh python "
        in srun
    )
    assert [line for line in lines if "submit.job_hook" in line and line.startswith(sys.executable)]


def replace_box(box: Container, **changes: object) -> Container:
    return Container.model_validate({**box.model_dump(), **changes})


@pytest.mark.parametrize(
    "setup",
    [
        (), ("set -euo pipefail",), ("set -eE", "trap 'exit 9' ERR"), ("trap 'exit 8' TERM USR1", "cd /"), ("set -f", "IFS=1"),
        ("kill -USR1 $$", "true"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("told", ["", "kill -USR1 $PPID; kill -TERM $PPID; kill -USR2 $PPID; "])
def test_the_end_is_recorded_whatever_the_sites_lines_leave_behind_and_whoever_signals_the_shell(
    tmp_path: Path, setup: tuple[str, ...], told: str
) -> None:
    for name, text in (("srun", f"{told}exit 137"), ("hook", f'echo "$@" >> {tmp_path}/calls')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    profile = Profile(host_python=str(tmp_path / "hook"), setup=setup)
    text = slurm.script(profile, PLACE)
    done = subprocess.run(["bash"], input=text, text=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert done.returncode == 0  # of the job hook
    deadline = time.monotonic() + 60
    while "guard" not in (tmp_path / "calls").read_text() and time.monotonic() < deadline:
        time.sleep(0.02)  # it runs beside the script
    calls = re.findall(r"dattrain\.submit\.job_hook (.*)", (tmp_path / "calls").read_text())
    assert sorted(calls) == ["begin /r/demo", "end /r/demo 137", "guard /r/demo"]


def test_array_has_one_run_folder_per_task_and_bash_finds_it() -> None:
    place = replace(PLACE, runs=(Path("/r/x/lr=1"), Path("/r/x/lr=2 b")), folder=Path("/r/x/submit/slurm"))
    lines = _script(Profile(), place)
    assert "#SBATCH --array=0-1%2" in lines
    assert "#SBATCH --output=/r/x/submit/slurm/%A_%a_0_log.out" in lines
    (runs,) = [line for line in lines if line.startswith("DATTRAIN_RUNS")]
    (run,) = [line for line in lines if line.startswith("export DATTRAIN_RUN=")]
    shown = subprocess.check_output(
        ["bash", "-c", f'SLURM_ARRAY_TASK_ID=1\n{runs}\n{run}\necho "$DATTRAIN_RUN"'], text=True
    )
    assert shown.strip() == "/r/x/lr=2 b"


def test_an_array_runs_so_many_at_a_time() -> None:
    runs = tuple(Path(f"/r/x/{n}") for n in range(300))
    assert "#SBATCH --array=0-299%300" in _script(Profile(), replace(PLACE, runs=runs))
    assert "#SBATCH --array=0-299%2" in _script(Profile(), replace(PLACE, runs=runs, parallel=2))


def test_a_range_of_nodes_and_a_dependency() -> None:
    lines = _script(Profile(), replace(PLACE, nodes=(2, 4), dependency="afterok:7"))
    assert "#SBATCH --nodes=2-4" in lines
    assert "#SBATCH --dependency=afterok:7" in lines
    assert "#SBATCH --kill-on-invalid-dep=yes" in lines


@pytest.mark.parametrize("name", sorted(p.stem for p in CLUSTERS.glob("*.yaml")))
def test_shipped_profiles_give_scripts_that_bash_can_read(name: str) -> None:
    profile = cluster.load(name)
    if profile.kind == "slurm":
        subprocess.run(["bash", "-n"], input=slurm.script(profile, PLACE), text=True, check=True)
