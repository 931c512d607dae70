"""A forward pass under a mode, a trace, a transform or in a thread leaves nothing in the model for the next one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dattrain import ops
from dattrain.models import VARIANTS, create
from dattrain.ops import neighborhood

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["dat_tiny", "dat_pp_tiny"])
def model(request, monkeypatch):
    monkeypatch.setattr(neighborhood, "_kept", {})
    torch.manual_seed(0)
    dims = tuple(8 * heads for heads in VARIANTS[request.param]["heads"])
    blocks = {"dat_tiny": ("S", "S", "D", "S"), "dat_pp_tiny": ("N", "N", "D", "N")}[request.param]
    return create(request.param, num_classes=3, img_size=64, dims=dims, blocks=blocks).eval()


def under_inference(model):
    with torch.inference_mode():
        model(IMAGES)


def under_fake_tensors(model):
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.randn(2, 3, 64, 64))


def under_a_transform(model):
    torch.func.grad(lambda x: model(x).sum())(IMAGES)


def under_a_trace(model):
    with torch.no_grad():
        torch.jit.trace(model, IMAGES)  # compares the graphs of two passes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "before",
    [under_inference, under_fake_tensors, under_a_transform, under_a_trace],
    ids=lambda f: f.__name__,
)
def test_training_after_it_is_training_alone(model, before):
    before(model)
    kept = [
        value for module in model.modules() for value in vars(module).values() if isinstance(value, tuple)
    ]
    assert not [each for value in kept for each in value if isinstance(each, torch.Tensor)]
    for made in neighborhood._kept.values():
        for each in made:
            assert type(each) is torch.Tensor and not each.is_inference()
            assert not torch._C._functorch.is_functorch_wrapped_tensor(each)
    found = train(model)
    neighborhood._kept.clear()
    assert all(torch.equal(a, b) for a, b in zip(found, train(model)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_trace_is_right_at_other_sizes(model, backend):
    """An operator in it would hold the traced map's height and width as numbers, and read past a smaller one."""
    with torch.no_grad(), ops.use_backend(backend):
        traced = torch.jit.trace(model, IMAGES[:1], check_trace=False)
        assert "dattrain::" not in str(traced.inlined_graph)
        for size in ((3, 3, 64, 64), (1, 3, 32, 32), (1, 3, 289, 97)):
            images = torch.randn(*size)
            torch.testing.assert_close(traced(images), model(images), rtol=1e-4, atol=1e-5)


def train(model):
    model.zero_grad()
    out = model(IMAGES)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


def test_threads_with_other_sizes_do_not_meet(model, monkeypatch):
    """Two sizes with as many windows of the same area: a mask of the other one would fit."""
    sizes = [(64, 128), (128, 64)]
    images = [torch.randn(1, 3, *size) for size in sizes]
    with torch.no_grad():
        wanted = [model(each) for each in images]
        turns = [0, 1] * 8
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda turn: no_grad(model, images[turn]), turns))
    assert all(torch.equal(each, wanted[turn]) for each, turn in zip(found, turns))


def no_grad(model, images):
    with torch.no_grad():
        return model(images)
