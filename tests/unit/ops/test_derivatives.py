"""Forward mode, torch.func and second order: every public operator is differentiated by torch then, or its tangent is lost."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from dattrain import ops
from dattrain.models import VARIANTS, create

WIDE = torch.float64


def leaf(*shape: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator, dtype=WIDE) * scale).requires_grad_()


MASK = -100 * torch.eye(4, dtype=WIDE).expand(2, 4, 4)
FUNCTIONS = {
    "sample": (ops.sample, (leaf(1, 3, 4, 4), leaf(1, 2, 2, 2, scale=0.4))),
    "depthwise_conv": (ops.depthwise_conv, (leaf(1, 3, 2, 4), leaf(2, 1, 3, 3), leaf(2))),
    "window_attention": (
        lambda *i: ops.window_attention(*i, MASK, 2),
        (leaf(1, 2, 4, 12, scale=0.5), leaf(2, 4, 4)),
    ),
    "biased_attention": (
        ops.biased_attention,
        (leaf(1, 2, 3, 2), leaf(1, 2, 4, 2), leaf(1, 2, 4, 2), leaf(1, 2, 3, 4)),
    ),
    "attention without bias": (
        lambda *i: ops.biased_attention(*i, None),
        (leaf(1, 2, 3, 2), leaf(1, 2, 4, 2), leaf(1, 2, 4, 2)),
    ),
    "deform_attention": (
        lambda *i: ops.deform_attention(*i, height=2, width=2),
        (leaf(1, 2, 4, 2), leaf(1, 2, 3, 2), leaf(1, 2, 3, 2), leaf(1, 1, 3, 2, scale=0.3), leaf(2, 3, 3)),
    ),
}


@pytest.mark.parametrize("backend", ["", "torch"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_kind_of_derivative_is_a_finite_difference(name, frozen, backend, monkeypatch):
    monkeypatch.setenv("DATTRAIN_ATTENTION", backend)
    function, inputs = FUNCTIONS[name]
    if frozen:
        inputs = (inputs[0], *(x.detach() for x in inputs[1:]))
    assert torch.autograd.gradcheck(
        function,
        inputs,
        fast_mode=True,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    if name == "attention without bias":  # torch's fused kernel refuses
        monkeypatch.setenv("DATTRAIN_ATTENTION", "reference")
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_an_input_made_from_another_is_counted_once():
    """Positions are made from queries; what reaches a query through them must not be in the operator's own gradient of it."""
    x = leaf(1, 3, 3, 2)

    def chained(x):
        positions = x.mean((1, 2)).view(1, 1, 1, 2).tanh()
        return ops.sample(x, positions)

    assert torch.autograd.gradgradcheck(chained, (x,))


@pytest.fixture(params=["dat_atto", "dat_pp_tiny"])
def model(request):
    torch.manual_seed(0)
    dims = tuple(8 * heads for heads in VARIANTS[request.param]["heads"])
    blocks = {} if request.param == "dat_atto" else {"blocks": ("N", "D", "ND", "D")}
    return create(request.param, num_classes=3, img_size=64, dims=dims, **blocks).double().eval()


def test_a_model_under_torch_func(model):
    images, labels = torch.randn(2, 3, 64, 64, dtype=WIDE), torch.tensor([0, 2])
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights, image, label):
        logits = functional_call(model, weights, (image[None],))
        return torch.nn.functional.cross_entropy(logits, label[None])

    wanted = []
    for image, label in zip(images, labels):
        model.zero_grad()
        loss(dict(model.named_parameters()), image, label).backward()
        wanted.append({name: parameter.grad for name, parameter in model.named_parameters()})
    found = grad(loss)(weights, images[0], labels[0])
    each = vmap(grad(loss), (None, 0, 0))(weights, images, labels)
    for name in weights:
        torch.testing.assert_close(found[name], wanted[0][name])
        torch.testing.assert_close(each[name], torch.stack([one[name] for one in wanted]))
    tangent, step = torch.randn_like(images), 1e-6
    with torch.no_grad():
        difference = (model(images + step * tangent) - model(images - step * tangent)) / (2 * step)
    _, derivative = jvp(model, (images,), (tangent,))
    torch.testing.assert_close(derivative, difference, rtol=1e-5, atol=1e-7)
    jacobian = jacrev(lambda image: model(image[None])[0])(images[0])
    torch.testing.assert_close((jacobian * tangent[0]).sum((1, 2, 3)), derivative[0])


def test_a_model_under_a_gradient_penalty(model):
    image = torch.randn(1, 3, 64, 64, dtype=WIDE, requires_grad=True)
    parameter = model.head.fc.weight

    def penalty():
        (slope,) = torch.autograd.grad(model(image).square().sum(), image, create_graph=True)
        return slope.square().sum()

    (found,) = torch.autograd.grad(penalty(), parameter)
    with torch.no_grad():
        direction, step = torch.randn_like(parameter), 1e-5
        parameter += step * direction
    above = penalty().detach()
    with torch.no_grad():
        parameter -= 2 * step * direction
    below = penalty().detach()
    torch.testing.assert_close((found * direction).sum(), (above - below) / (2 * step), rtol=1e-4, atol=1e-8)


class _Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_the_usual_path_keeps_its_operators_before_and_after():
    function, inputs = FUNCTIONS["deform_attention"]

    def operators():
        with _Called() as called:
            function(*inputs).sum().backward()
        return [name for name in called.names if name.startswith("dattrain::")]

    kept = ["dattrain::deform_attention", "dattrain::deform_attention_backward"]
    assert operators() == kept
    jvp(lambda q: function(q, *inputs[1:]), inputs[:1], inputs[:1])
    assert operators() == kept


def test_torch_compile_asks_where_it_traces():
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    function, inputs = FUNCTIONS["deform_attention"]
    q, *others = (x.detach() for x in inputs)
    compiled = torch.compile(lambda q: function(q, *others), backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(q), function(q, *others))
    assert "dattrain.deform_attention" in graphs[0]

    def forward_mode(q):
        return jvp(lambda q: function(q, *others), (q,), (q,))[1]

    found = torch.compile(forward_mode, backend=backend, fullgraph=True)(q)
    torch.testing.assert_close(found, forward_mode(q))
    assert "dattrain.deform_attention" not in graphs[1]
