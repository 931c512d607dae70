"""``python -m benchmarks.gpu --dry-run``: every stage is walked on the CPU, so that none rots while there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import interpreter
import pytest
import warm

from benchmarks.gpu.stages import STAGES

ROOT = Path(__file__).parents[2]
ALIKE = {"table", "large", "step", "memory", "largest", "checkpoint"}
"""Their code is that of ``model``, ``waits`` and of ``dattrain bench``, which has tests of its own."""
KERNELS = ["kernels"]
"""Starts cold: triton reads TRITON_INTERPRET, which this stage sets, when it is imported."""
HERE = [stage.name for stage in STAGES if stage.name not in {*ALIKE, *KERNELS}]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(HERE, id="most"),
        pytest.param(KERNELS, id="kernels", marks=interpreter.needs_interpreter),
        pytest.param(sorted(ALIKE), id="alike", marks=pytest.mark.full),
    ],
)
def test_every_stage_is_walked(names, tmp_path):
    environment = {**os.environ, "DATTRAIN_ATTENTION": ""}
    run = subprocess.run if names == KERNELS else warm.run
    done = run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--dry-run", "--only", *names],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    entries = json.loads((tmp_path / "results.json").read_text())["stages"]
    failed = [(e["stage"], e["reason"]) for e in entries if e["status"] == "failed"]
    assert done.returncode == 0 and not failed, (
        failed,
        (tmp_path / "log.txt").read_text(errors="replace")[-4000:],
    )
    assert [e["stage"] for e in entries] == [stage.name for stage in STAGES if stage.name in names]
    # A CPU's figure is none of a GPU.
    assert {e["status"] for e in entries} == {"not run"} and all(e["dry"] for e in entries)
    assert "DRY RUN" in (tmp_path / "table.txt").read_text()
    figures = {e["stage"]: e["figures"] for e in entries}
    for stage, figure in (
        ("kernels", "cases outside their bounds"),
        ("kernels", "cases that differ between two runs"),
        ("train", "tensors that differ after SIGKILL and resume"),
        ("train", "tensors that differ between background and foreground saves"),
        ("train", "losses not finite in fp16"),
        ("dense", "tensors that differ after SIGKILL and resume"),
        ("dense", "losses not finite"),
        ("detect", "tensors that differ after SIGKILL and resume"),
        ("detect", "losses not finite"),
        ("augment", "images that differ from the CPU's"),
    ):
        if stage in names:
            assert figures[stage][figure]["value"] == 0, (stage, figure)
    if "train" in names:
        assert figures["train"]["resumed"]["value"] == 1
        assert figures["augment"]["changed by the policy"]["value"] > 4
