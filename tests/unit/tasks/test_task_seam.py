"""A task that is not classification runs through the engine: samples of different sizes, named losses, metrics that are no sums."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dattrain.config.load import loads
from dattrain.engine.evaluate import check_metric, evaluate
from dattrain.engine.step import TrainStep
from dattrain.engine.step_status import reduce_status
from dattrain.errors import ConfigError
from dattrain.runtime.signals import StopRequest
from dattrain.tasks.base import Loss
from dattrain.tasks.classification import Classification

CPU = torch.device("cpu")
CONFIG = loads("train: {global_batch: 4, micro_batch: 2, precision: fp32}\nzero: {stage: 0}").config


@dataclass
class Boxes:
    """Two images and their boxes, as many as there are."""

    images: list[torch.Tensor]
    boxes: list[torch.Tensor]
    position: torch.Tensor
    keys: list[str]


def batch(first, *counts):
    images = [torch.full((3, 4 + n, 5), float(n)) for n in counts]
    boxes = [torch.arange(4.0 * n).reshape(n, 4) for n in counts]
    return Boxes(
        images, boxes, torch.arange(first, first + len(counts)), [f"k{first + i}" for i in range(len(counts))]
    )


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return [self.scale * image.mean() for image in images]


class Detection:
    """The members of a task that an update and an evaluation use."""

    def loss(self, forward, batch, *, noise, dtype):
        found = forward([image.to(dtype) for image in batch.images])
        scores = torch.stack(found).double()
        count = torch.tensor([float(len(boxes)) for boxes in batch.boxes], dtype=torch.float64)
        parts = {"loss_box": (scores * count).sum(), "loss_cls": scores.sum()}
        total = sum(parts.values())
        detached = {name: value.detach() for name, value in parts.items()}
        return Loss(total / 2, total.detach(), torch.tensor(2.0, dtype=torch.float64), detached)

    def evaluator(self, device, dtype):
        return Found()


class Found:
    """Needs every rank's detections at once."""

    def __init__(self):
        self.detections = []

    def update(self, forward, batch, *, lockstep):
        self.detections += [(key, float(x)) for key, x in zip(batch.keys, forward(batch.images))]

    def compute(self, ranks):
        everyone = [found for each in ranks.gather(self.detections) for found in each]
        return {"AP": max(score for _, score in everyone), "loss": 0.0, "images": len(everyone)}

    def predictions(self, ranks):
        return {}


class Engine(Detector):
    """What the step asks of DeepSpeed under stage 0."""

    def __init__(self):
        super().__init__()
        self.__dict__["module"] = self  # not as a submodule
        self.basic_optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}], skip_next=lambda: None)

    def backward(self, loss):
        loss.backward()

    def step(self):
        pass


class Loader:
    wait_s = 0.0

    def __init__(self, *batches):
        self.batches = list(batches)

    def __next__(self):
        return self.batches.pop(0)


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_named_losses_are_summed_over_micro_batches_and_averaged_over_samples(group):
    step = TrainStep(Engine(), Detection(), CONFIG, 2, 0, CPU)
    update = step(Loader(batch(0, 1, 3), batch(2, 0, 2)), 0.1)
    # Images are filled with the number of their boxes, which is so the score too.
    assert update.parts == {"loss_box": 1 + 9 + 0 + 4, "loss_cls": 1 + 3 + 0 + 2}
    assert update.loss_sum == 20 and update.weight == 4 and update.keys == ["k0", "k1", "k2", "k3"]
    assert step.engine.basic_optimizer.param_groups[0]["lr"] == 0.1 and float(step.engine.scale.grad) == 10
    status = reduce_status(update, request=StopRequest.NONE, save_failed=False, bad_samples=0, device=CPU)
    assert (status.loss, status.parts) == (5.0, {"loss_box": 3.5, "loss_cls": 1.5})


def test_an_evaluation_may_need_every_ranks_detections(group):
    found, _ = evaluate(Engine(), [batch(0, 1, 3), batch(2, 2)], Detection(), CONFIG, CPU)
    assert found == {"AP": 3.0, "loss": 0.0, "images": 3}


def test_a_metric_that_no_evaluation_has_is_refused():
    config = loads("checkpoint: {metric: top2}").config
    with pytest.raises(ConfigError, match=r"checkpoint.metric=top2 .*; it has top1, top5, loss, ema_top1"):
        check_metric(config, Classification(config))
    config = loads("checkpoint: {metric: ema_loss}").config
    check_metric(config, Classification(config))
