"""What a submission takes along from the shell, and the job id in what sbatch and a site print."""

from __future__ import annotations

import pytest

from dattrain.errors import ConfigError
from dattrain.submit import cluster, shell
from dattrain.submit.cluster import Profile

SCRIPT = """#!/bin/bash
#SBATCH --constraint='h100&ib'
#SBATCH --gpus-per-node=4
#SBATCH --job-name=demo
#SBATCH --mem=0
#SBATCH --no-requeue
#SBATCH --partition=main
#SBATCH --time=60
echo
#SBATCH-not --account=x
"""


def test_the_script_holds_and_what_it_leaves_open_comes_from_the_shell() -> None:
    kept = {
        "SBATCH_ACCOUNT": "proj2", "SBATCH_QOS": "high", "SBATCH_EXPORT": "NONE", "SBATCH_GRES": "nvme:1",
        "SLURM_CONF": "/x", "SLURM_CLUSTERS": "big", "SLURM_JWT": "token", "PATH": "/bin", "RANKING": "1",
    }  # fmt: skip
    gone = {
        "SBATCH_PARTITION": "urgent", "SBATCH_TIMELIMIT": "5", "SBATCH_JOB_NAME": "mine", "SBATCH_CONSTRAINT": "a100",
        "SBATCH_MEM_PER_CPU": "4G", "SBATCH_MEM_PER_NODE": "4G", "SBATCH_GPUS": "8", "SBATCH_GPUS_PER_TASK": "1",
        "SBATCH_REQUEUE": "", "SBATCH_NO_REQUEUE": "", "SBATCH_ARRAY_INX": "0-9", "SBATCH_WAIT": "", "SBATCH_NTASKS_PER_GPU": "2",
        "SBATCH_CLUSTERS": "big",
        "SLURM_JOB_ID": "5", "SLURM_NTASKS": "64", "SLURM_CPUS_PER_TASK": "16", "SRUN_CPUS_PER_TASK": "16", "SUBMITIT_EXECUTOR": "x",
        "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "n9",
    }  # fmt: skip
    assert shell.clean_environment({**kept, **gone}, SCRIPT) == kept
    assert "SBATCH_GRES" not in shell.clean_environment({"SBATCH_GRES": "gpu:2"}, SCRIPT)
    # Without devices, memory or a partition in the script the shell's hold.
    free = {"SBATCH_GRES": "gpu:2", "SBATCH_MEM_PER_CPU": "4G", "SBATCH_PARTITION": "urgent"}
    assert shell.clean_environment(free, "#SBATCH --time=60\n") == free


def test_what_does_not_hold_is_known_with_what_does() -> None:
    found = shell.overruled(
        {"SBATCH_PARTITION": "urgent", "SBATCH_CONSTRAINT": "x", "SBATCH_WAIT": "1"}, SCRIPT
    )
    assert found == {
        "SBATCH_PARTITION": ("partition", "main"),
        "SBATCH_CONSTRAINT": ("constraint", "h100&ib"),
        "SBATCH_WAIT": ("", ""),
    }


def test_a_profile_takes_what_it_leaves_open() -> None:
    environ = {
        "SBATCH_ACCOUNT": "proj2",
        "SBATCH_PARTITION": "urgent",
        "SBATCH_TIMELIMIT": "2:00:00",
        "SBATCH_QOS": "",
    }
    made, notes = cluster.from_shell(Profile(partition="main", account=None), environ)
    assert (made.account, made.partition, made.time, made.qos) == ("proj2", "main", "2:00:00", None)
    assert notes == [
        "account=proj2 comes from SBATCH_ACCOUNT of this shell",
        "time=2:00:00 comes from SBATCH_TIMELIMIT of this shell",
    ]
    assert cluster.from_shell(Profile(time="24:00:00"), environ)[0].time == "24:00:00"
    assert cluster.from_shell(Profile(kind="local"), environ) == (Profile(kind="local"), [])
    with pytest.raises(ConfigError, match="SBATCH_ variables of this shell: time: 'soon' is not a time"):
        cluster.from_shell(Profile(), {"SBATCH_TIMELIMIT": "soon"})


@pytest.mark.parametrize(
    ("printed", "found"),
    [
        ("42\n", "42"),
        ("42;big\n", "42"),
        ("Submitted batch job 42\n", "42"),
        ("Submitted batch job 42 on cluster big\n", "42"),
        ("----\n  Welcome to job 1\n--> Verifying job 7 ...OK\n2\n42\nThank you, job 3\n", "42"),
        ("Welcome to job 1\nSubmitted batch job 42\nhave 99 h left\n", "42"),
        ("Welcome to job 1\n", None),
        ("", None),
    ],
)
def test_the_job_id_among_what_a_site_prints(printed: str, found: str | None) -> None:
    assert shell.job_id(printed) == found
