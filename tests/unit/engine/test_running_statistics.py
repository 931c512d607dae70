"""Running statistics of BatchNorm through updates that are skipped, and through averages of the weights."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dattrain.config.load import loads
from dattrain.engine.running_statistics import RunningStatistics
from dattrain.engine.step import TrainStep
from dattrain.tasks.base import Loss

CPU = torch.device("cpu")
CONFIG = loads("train: {global_batch: 4, micro_batch: 2, precision: fp32}\nzero: {stage: 0}").config


class Engine(nn.Module):
    """What the step asks of DeepSpeed under stage 0, around a BatchNorm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.__dict__["module"] = self
        self.skipped = 0
        self.basic_optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}], skip_next=self.skip)

    def skip(self):
        self.skipped += 1

    def forward(self, x):
        return self.norm(x)

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.zero_grad()


class Task:
    """The mean of the output is the loss."""

    def loss(self, forward, batch, *, noise, dtype):
        total = (forward(batch.images) * torch.arange(3.0).view(3, 1, 1)).pow(2).sum()
        return Loss(total, total.detach().double(), torch.tensor(2.0, dtype=torch.float64))


class Loader:
    wait_s = 0.0

    def __init__(self, *images):
        self.images = list(images)

    def __next__(self):
        return SimpleNamespace(images=self.images.pop(0), keys=["a", "b"], position=torch.arange(2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_skipped_update_leaves_them_as_they_were(bad):
    torch.manual_seed(0)
    engine = Engine()
    step = TrainStep(engine, Task(), CONFIG, 2, 0, CPU)
    assert step(Loader(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)), 0.1).applied
    before = {name: buffer.clone() for name, buffer in engine.named_buffers()}
    assert int(before["norm.num_batches_tracked"]) == 2 and bool(before["norm.running_mean"].any())
    broken = torch.randn(2, 3, 4, 4)
    broken[0, 1, 2, 3] = bad
    assert not step(Loader(torch.randn(2, 3, 4, 4), broken), 0.1).applied and engine.skipped == 1
    for name, buffer in engine.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_a_model_without_any_costs_nothing():
    statistics = RunningStatistics(nn.LayerNorm(3))
    statistics.remember()
    statistics.restore()
    statistics.average()
