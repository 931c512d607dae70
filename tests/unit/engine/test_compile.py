import logging

import torch
from torch import nn

from dattrain.engine import compile as compiling


class Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList(Stage() for _ in range(2))

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return x


def test_what_cannot_be_compiled_runs_as_it_is_with_one_line(monkeypatch, caplog):
    from torch._dynamo.exc import Unsupported

    tried = []

    def compile_(forward):
        def fail(*args):
            tried.append(args)
            raise Unsupported("no compiler here")

        return fail

    monkeypatch.setattr(torch, "compile", compile_)
    x, net = torch.ones(2, 4), Net()
    expected = Net()(x)
    names = [name for name, _ in net.named_parameters()]
    assert compiling.apply(net, "block") == 4
    with caplog.at_level(logging.WARNING):
        assert torch.equal(net(x), expected)
        assert torch.equal(net(x), expected)
    assert len(tried) == 1, "after the first failure nothing is tried again"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "train.compile=block" in caplog.text and "uncompiled" in caplog.text
    assert [name for name, _ in net.named_parameters()] == names


def test_units(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda forward: compiled.append(forward) or forward)
    assert compiling.apply(Net(), "none") == 0 and not compiled
    assert compiling.apply(Net(), "stage") == 2 and len(compiled) == 2


def test_an_error_of_the_model_itself_is_not_taken_for_one_of_the_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward: forward)
    net = Net()
    compiling.apply(net, "block")
    try:
        net(torch.ones(2, 5))
    except RuntimeError as error:
        assert "shapes cannot be multiplied" in str(error)
    else:
        raise AssertionError("the error was swallowed")
