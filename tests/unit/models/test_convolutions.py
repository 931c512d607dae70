"""What is an ``nn.Conv2d`` is one to any tool: B x C x H x W in and out, and its constructor. The convolutions of maps are none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dattrain.models import VARIANTS, create
from dattrain.models.blocks import DepthwiseConv, PatchConv


@pytest.fixture(params=["dat_tiny", "dat_pp_tiny"])
def model(request):
    torch.manual_seed(0)
    dims = tuple(8 * heads for heads in VARIANTS[request.param]["heads"])
    return create(request.param, num_classes=3, img_size=64, dims=dims).eval()


def test_a_conv2d_of_a_model_convolves_images(model):
    """Low-rank adapters run a second convolution of the same kind, built by its class, beside the first."""
    seen = []

    def check(module, inputs, output):
        plain = F.conv2d(inputs[0], module.weight, module.bias, module.stride, module.padding)
        torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-5)
        beside = type(module)(
            module.in_channels, 4, module.kernel_size, module.stride, module.padding, bias=False
        )
        narrow = type(module)(4, module.out_channels, (1, 1), (1, 1))
        assert narrow(beside(inputs[0])).shape == output.shape
        seen.append(module)

    found = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for module in found:
        module.register_forward_hook(check)
    with torch.no_grad():
        model(torch.randn(2, 3, 70, 61))
    assert set(seen) == set(found)


def test_a_convolution_of_maps_is_no_conv2d_but_drawn_as_one():
    for ours, theirs in (
        (lambda: PatchConv(6, 8, 2), lambda: nn.Conv2d(6, 8, 2, 2)),
        (lambda: PatchConv(6, 8, 2, bias=False), lambda: nn.Conv2d(6, 8, 2, 2, bias=False)),
        (lambda: DepthwiseConv(6, 5, 2), lambda: nn.Conv2d(6, 6, 5, 2, 2, groups=6)),
    ):
        states, outputs = [], []
        x = torch.randn(2, 4, 6, 6)
        for make in (ours, theirs):
            torch.manual_seed(3)
            module = make()
            states.append(module.state_dict())
            is_conv = isinstance(module, nn.Conv2d)
            out = module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if is_conv else module(x)
            outputs.append((is_conv, out))
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert [is_conv for is_conv, _ in outputs] == [False, True]
        torch.testing.assert_close(outputs[0][1], outputs[1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "shape, found", [((1, 4, 64, 64), "got 4 channels"), ((3, 64, 64), "got 3 dimensions")]
)
def test_images_that_do_not_fit_are_refused_by_shape(model, shape, found):
    with pytest.raises(ValueError, match=rf"expected 3 channels .*{found}"):
        model(torch.zeros(shape))


@pytest.mark.parametrize("stride", [1, 2])
def test_every_parameter_has_a_gradient_without_offsets(stride):
    """DDP waits for all of them."""
    torch.manual_seed(0)
    strides = (1, 1, stride, stride)
    model = create("dat_atto", num_classes=3, img_size=64, offsets=False, strides=strides)
    images = torch.randn(2, 3, 64, 64)
    logits = model(images)
    with torch.no_grad():
        torch.testing.assert_close(model(images), logits.detach(), rtol=1e-4, atol=1e-5)
    logits.square().sum().backward()
    unused = {name: p.grad for name, p in model.named_parameters() if ".offset." in name}
    assert unused and not any(grad.any() for grad in unused.values())
    assert all(p.grad is not None for p in model.parameters())
