import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from host_waits import fake_cuda
from torch import nn

from dattrain.config.load import loads
from dattrain.data.batch import Batch
from dattrain.data.philox import Stream, uniform32
from dattrain.engine.step import TrainStep, seed_all
from dattrain.tasks.classification import Classification

RECIPE = "model: {num_classes: 3}\naugment: {label_smoothing: 0.0}\ntrain: {global_batch: 4, micro_batch: 4, precision: fp32}\n"


class Net(nn.Module):
    """Logits are the mean of the image's channels; keeps the noise that it was given."""

    def __init__(self):
        super().__init__()
        self.__dict__["module"] = self  # as an engine has it, and not as a submodule

    def forward(self, x, drop_path_noise=None):
        self.noise = drop_path_noise
        return x.mean((2, 3)) * torch.ones((), requires_grad=True)


def batch(weight=(1, 1, 1, 1), positions=(3, 1, 8, 2)):
    torch.manual_seed(0)
    return Batch(
        images=torch.randn(4, 3, 2, 2),
        labels=torch.tensor([0, 1, 2, 1]),
        weight=torch.tensor(weight, dtype=torch.float32),
        position=torch.tensor(positions),
        keys=list("abcd"),
    )


def train_step(drop_path=0, device="cpu"):
    config = loads(RECIPE).config
    return TrainStep(Net(), Classification(config), config, 1, drop_path, torch.device(device))


def test_a_bad_sample_has_no_weight_and_leaves_the_divisor_alone():
    made = batch(weight=(1, 0, 1, 1))
    loss = train_step().forward(made)
    each = nn.functional.cross_entropy(made.images.mean((2, 3)), made.labels, reduction="none")
    assert float(loss.total) == pytest.approx(float(each[0] + each[2] + each[3]), rel=1e-6)
    assert float(loss.value.detach()) == pytest.approx(float(loss.total) / 4, rel=1e-6)
    assert float(loss.weight) == 3


def test_noise_is_a_function_of_the_sample():
    made = train_step(drop_path=6)
    made.forward(batch())
    expected = uniform32(0, Stream.DROP_PATH, np.array([3, 1, 8, 2]), 6)
    assert torch.equal(made.engine.noise, torch.from_numpy(expected))
    made.forward(batch(positions=(2, 8, 1, 3)))
    assert torch.equal(made.engine.noise, torch.from_numpy(expected[::-1].copy()))
    plain = train_step()
    plain.forward(batch())
    assert plain.engine.noise is None


def test_a_micro_batch_never_waits_for_the_device():
    cuda = torch.device("cuda")
    made = train_step(6, cuda)
    # Positions stay on the host, and fake tensors have no values.
    host = replace(batch(), position=SimpleNamespace(numpy=lambda: np.arange(4)))
    with fake_cuda() as waits:
        images, labels = (torch.empty_like(x, device=cuda) for x in (host.images, host.labels))
        made.forward(replace(host, images=images, labels=labels, weight=torch.empty(4, device=cuda)))
    assert made.engine.noise.device.type == "cuda"
    assert not waits.found, waits.report()


def test_an_infinite_loss_makes_its_gradients_not_finite_too():
    images = batch().images
    images[1, 1] = -math.inf
    images.requires_grad_()
    made = Batch(images, batch().labels, batch().weight, batch().position, list("abcd"))
    loss = train_step().forward(made)
    assert math.isinf(float(loss.total))
    loss.value.backward()
    # Of every sample, not of the broken one alone: each parameter's gradient must tell.
    assert not torch.isfinite(images.grad).any()


def test_generators_are_functions_of_the_position():
    def draw(*key):
        seed_all(*key)
        return float(torch.rand(())), float(np.random.rand())

    first = draw(0, 64, 1)
    draw(0, 96, 1)
    assert draw(0, 64, 1) == first
    assert len({first, draw(0, 96, 1), draw(0, 64, 0), draw(1, 64, 1)}) == 4
