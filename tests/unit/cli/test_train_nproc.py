"""``dattrain train --nproc`` within a Slurm step: an interactive shell of one task is no rank."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from dattrain.cli.main import main
from dattrain.config.run import is_rank
from dattrain.runtime.spawn import launch

# As srun --pty bash and salloc with use_interactive_step set them: the job of the second has four tasks, its shell is one.
SHELL = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "1",
}
INTERACTIVE = {**SHELL, "SLURM_STEP_ID": "4294967290", "SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n1"}


@pytest.mark.parametrize(
    ("environ", "rank"),
    [
        ({}, False),
        (SHELL, False),
        (INTERACTIVE, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, False),  # salloc's own shell
        ({**SHELL, "SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, True),
        ({**SHELL, "RANK": "0", "WORLD_SIZE": "1"}, True),
    ],
)
def test_only_one_of_several_is_a_rank(environ: dict[str, str], rank: bool) -> None:
    assert is_rank(environ) == rank


def test_a_rank_starts_no_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "in1k_dat_tiny_224", "--nproc", "2"]) == 2
    assert "this process is one already" in capsys.readouterr().err


def test_the_ranks_take_nothing_of_the_step_for_their_own(tmp_path: Path) -> None:
    write = (
        "import os, pathlib; from dattrain.runtime.environment import resolve; e = resolve(os.environ);"
        f"pathlib.Path({str(tmp_path)!r}, str(e.rank)).write_text(repr((e.world, e.local_world, e.launcher, e.master_addr)))"
    )
    outer = {**os.environ, **INTERACTIVE, "MASTER_ADDR": "n1-ib0", "DATTRAIN_RENDEZVOUS_SUFFIX": "-ib0"}
    assert launch([sys.executable, "-c", write], 2, outer) == 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("0", "1"), "(2, 2, 'local', '127.0.0.1')"
    )
