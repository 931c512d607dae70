import logging

import pytest
import torch
from torch import nn

from dattrain.engine import compile as compiling
from dattrain.errors import UserError
from dattrain.models.dense.backbone import create_backbone
from dattrain.models.dense.segmenter import create_segmenter


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

    def compile_(forward, **_):
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
    monkeypatch.setattr(torch, "compile", lambda forward, **_: compiled.append(forward) or forward)
    assert compiling.apply(Net(), "none") == 0 and not compiled
    assert compiling.apply(Net(), "stage") == 2 and len(compiled) == 2


def test_blocks_of_other_shapes_are_graphs_of_their_own_with_fixed_shapes(monkeypatch):
    """A stage halves the map and doubles the channels; symbolic shapes were slower, and inductor refused some."""
    shapes, compile_ = [], torch.compile

    def backend(graph, inputs):
        # A symbolic side would be an input too, which is no tensor.
        shapes.append([tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in inputs][2:])
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda forward, **k: compile_(forward, backend=backend, **k))
    torch._dynamo.reset()
    net = Net()
    for width, stage in zip((4, 8), net.stages):
        stage.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
    compiling.apply(net, "block")
    for size, width, stage in zip((6, 3), (4, 8), net.stages):
        stage(torch.randn(2, size, width, requires_grad=True))
    assert shapes == [[(2, 6, 4)], [(2, 3, 8)]], "equal blocks share a graph"


def test_a_backward_pass_that_cannot_be_compiled_is_found_in_time(monkeypatch, caplog):
    from torch._dynamo.backends.common import aot_autograd

    def refuse(graph, inputs):
        raise RuntimeError("no code for this")

    backend = aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=refuse)
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward, **k: compile_(forward, backend=backend, **k))
    torch._dynamo.reset()
    net = Net()
    compiling.apply(net, "stage")
    with caplog.at_level(logging.WARNING):
        net(torch.ones(2, 4)).sum().backward()
    expected = Net()
    expected(torch.ones(2, 4)).sum().backward()
    for got, wanted in zip(net.parameters(), expected.parameters()):
        assert torch.equal(got.grad, wanted.grad)
    assert "no code for this" in caplog.text and len(caplog.records) == 1


def test_an_error_of_the_model_itself_is_not_taken_for_one_of_the_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    net = Net()
    compiling.apply(net, "block")
    try:
        net(torch.ones(2, 5))
    except RuntimeError as error:
        assert "shapes cannot be multiplied" in str(error)
    else:
        raise AssertionError("the error was swallowed")


def test_cuda_graphs_on_another_device_are_left_out_with_one_line(caplog):
    compiling.apply(Net(), "stage", graphs_on="cpu")
    assert len(caplog.records) == 1 and "train.cuda_graphs: the device is cpu" in caplog.text


def test_a_backbones_blocks_are_compiled_in_training_alone(monkeypatch):
    """Whole images of an evaluation have a size each; heads are left as they are."""
    calls = []

    def compile_(forward, **_):
        def compiled(*args):
            calls.append(args[0].shape)
            return forward(*args)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    for name, size in (("dat_atto", 64), ("swin_tiny_patch4_window7_224", 224)):
        backbone = create_backbone(name, img_size=size)
        model = create_segmenter(backbone, "semantic_fpn", 3, norm="group", channels=8)
        blocks = sum(backbone.depths)
        assert compiling.apply(model, "block", training_only=True) == blocks
        model.eval()(torch.rand(1, 3, 64, 64))
        assert not calls
        model.train()(torch.rand(1, 3, 64, 64))
        assert len(calls) == blocks
        calls.clear()
    with pytest.raises(UserError, match="train.compile=stage is for DAT.*choose block or none for swin_tiny"):
        compiling.apply(model, "stage")
