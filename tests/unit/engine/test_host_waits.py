"""The host waits for the device where an update must be agreed on, and nowhere else."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import warm
from host_waits import fake_cuda
from torch._subclasses.fake_tensor import FakeTensor

from dattrain.engine.step import Update
from dattrain.engine.step_status import reduce_status
from dattrain.runtime.signals import StopRequest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def update():
    """What one update waits for, by stage and place. In a process of its own: DeepSpeed keeps the first process group."""
    command = [sys.executable, "-m", "benchmarks.host_waits", "--json", *(f"update-{i}" for i in range(4))]
    done = warm.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("stage", range(4))
def test_an_update_never_stops_the_device(update, stage):
    found = update[f"update-{stage}"]
    assert any("step_status.py" in place for place in found)  # it counts
    assert not [place for place in found if place.startswith("SYNCHRONIZE")], found


@pytest.mark.parametrize("stage", range(4))
def test_an_update_is_read_once_and_agreed_on_once(update, stage):
    ours = {place: count for place, count in update[f"update-{stage}"].items() if " dattrain/" in place}
    files = [place.split()[1].split(":")[0] for place in ours]
    assert sorted(files) == ["dattrain/engine/step.py", "dattrain/engine/step_status.py"], ours
    assert set(ours.values()) == {1}, ours


def test_what_ranks_exchange_is_copied_without_waiting(monkeypatch):
    summed = []
    monkeypatch.setattr(dist, "all_reduce", summed.append)
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: [0.0] * len(tensor))  # the one read
    local = Update(1.0, 2.0, applied=True, grad_norm=1.0, data_wait_s=0.0, own_s=0.0, keys=[])
    with fake_cuda() as waits:
        cuda = torch.device("cuda")
        reduce_status(local, request=StopRequest.NONE, save_failed=False, bad_samples=0, device=cuda)
    assert len(summed) == 1 and summed[0].device.type == "cuda"
    assert not waits.found, waits.report()
