"""The pyramid's extra levels, where maps are as small as they get."""

import pytest
import torch
import torch.nn.functional as F

from dattrain.models.dense.fpn import FPN


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (3, 4)])
def test_gradients_of_extra_levels_are_the_same_whatever_memory_held(size):
    """oneDNN left some as they were, for bf16 maps of one column."""
    torch.manual_seed(0)
    neck = FPN([16], 16, "conv")
    maps = [torch.randn(2, 16, *size)]
    found = []
    for _ in range(8):
        dirt = [torch.full((each,), float("nan")) for each in (2304, 1000, 40_000, 300, 4608) * 4]
        del dirt
        neck.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            levels = neck(maps)
        torch.stack([level.float().square().sum() for level in levels]).sum().backward()
        found.append([conv.weight.grad.clone() for conv in neck.extra])
    assert all(torch.equal(a, b) for each in found for a, b in zip(each, found[0]))
    assert all(torch.isfinite(gradient).all() for gradient in found[0])


def test_extra_levels_are_padded_convolutions_of_the_last_map():
    neck = FPN([8, 16], 4, "conv")
    maps = [torch.randn(1, 8, 6, 10), torch.randn(1, 16, 3, 5)]
    levels = neck(maps)
    last = maps[-1]
    for level, conv in zip(levels[2:], neck.extra):
        last = F.conv2d(last, conv.weight, conv.bias, stride=2, padding=1)
        torch.testing.assert_close(level, last)
    assert [tuple(level.shape[2:]) for level in levels] == [(6, 10), (3, 5), (2, 3), (1, 2)]
