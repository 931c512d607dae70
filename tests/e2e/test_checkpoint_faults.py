"""Runs that are killed at any moment, and disks that fill up: every restart goes on, and nothing that was whole is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).parents[2]


def python(*arguments: object, timeout: float = 3000.0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return warm.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def kill(tmp_path: Path, kills: int, seed: int) -> dict[str, object]:
    done = python(Path(__file__).with_name("fault_campaign.py"), tmp_path / "runs", kills, seed)
    assert done.returncode == 0, done.stderr[-6000:]
    result = json.loads(done.stdout.splitlines()[-1])
    print(result)
    assert result["kills"] >= kills and result["runs"] >= 1
    return result


def test_killed_runs_end_where_the_undisturbed_ones_do(tmp_path):
    kill(tmp_path, 8, seed=1)


@pytest.mark.full
def test_two_hundred_kills(tmp_path):
    result = kill(tmp_path, 200, seed=2)
    kinds = result["by kind"]
    assert isinstance(kinds, dict) and len(kinds) >= 10, "kills of every kind have hit"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_stops_a_save_with_a_message_and_costs_nothing(small_disk, tmp_path):
    """The run ends with the reason and exit code 1; after room is made, the same command ends where it should."""
    script = Path(__file__).with_name("fault_disk.py")
    undisturbed = python(script, tmp_path / "roomy", tmp_path / "expected.json")
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 1_400_000))
    full = python(script, small_disk / "run", tmp_path / "got.json")
    assert full.returncode == 1, full.stderr[-3000:]
    message = full.stderr.splitlines()[-1]
    assert "could not be written to" in message and "No space left on device" in message
    assert "the last complete checkpoint is step_0000000" in message and "make room" in message
    from dattrain.state.format import checkpoint

    root = small_disk / "run" / "checkpoints"
    found = [e.folder for e in checkpoint.list_all(root)]
    assert found and all(checkpoint.verify(folder) for folder in found)
    assert not [p.name for p in root.iterdir() if p.name.startswith(".")], (
        "what could not be finished gives its space back"
    )
    again = python(script, small_disk / "run", tmp_path / "got.json")
    assert again.returncode == 1, "still full"
    assert [e.folder for e in checkpoint.list_all(root) if checkpoint.verify(e.folder)] == found
    filler.unlink()
    done = python(script, small_disk / "run", tmp_path / "got.json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "got.json").read_text() == (tmp_path / "expected.json").read_text()
