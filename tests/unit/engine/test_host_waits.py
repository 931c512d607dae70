"""The host waits for the device where an update must be agreed on, and nowhere else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def update():
    """What one update waits for, by stage and place. In a process of its own: DeepSpeed keeps the first process group."""
    command = [sys.executable, "-m", "benchmarks.host_waits", "--json", *(f"update-{i}" for i in range(4))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("stage", range(4))
def test_an_update_never_stops_the_device(update, stage):
    found = update[f"update-{stage}"]
    assert any("agree.py" in place for place in found)  # it counts
    assert not [place for place in found if place.startswith("SYNCHRONIZE")], found
