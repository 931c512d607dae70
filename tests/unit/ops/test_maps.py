"""Sampling, depthwise convolution and window attention: the native kernels against torch's own operators, values and all gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dattrain import ops
from dattrain.ops.cpp import build

NEEDS_NATIVE = pytest.mark.skipif(not build.status()[0], reason=build.status()[1])


MAPS = {
    "batch": st.integers(0, 3),
    "groups": st.integers(1, 3),
    "channels": st.sampled_from([1, 5, 16, 24, 40]),
}


def both(function: Callable[..., Tensor], *inputs: Tensor) -> list[tuple[Tensor, ...]]:
    """Output and gradients of all inputs, by the native kernels and by torch's."""
    results = []
    for backend in ("native", "torch"):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        with ops.use_backend(backend):  # type: ignore[arg-type]
            out = function(*leaves)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        results.append((out, *torch.autograd.grad(out, leaves, weights)))
    return results


@NEEDS_NATIVE
@settings(max_examples=40, deadline=None)
@given(
    **MAPS,
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    points=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_sampling_is_grid_sample(batch, groups, channels, height, width, points, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, height, width, groups * channels, generator=draw, dtype=torch.float64)
    positions = torch.rand(batch, groups, points, 2, generator=draw, dtype=torch.float64) * 3 - 1.5
    found, wanted = both(ops.sample, x, positions)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    maps = x.view(batch, height, width, groups, channels).permute(0, 3, 4, 1, 2).flatten(0, 1)
    if batch:
        grid = positions.flatten(0, 1).flip(-1).unsqueeze(1)
        plain = F.grid_sample(maps, grid, align_corners=True).view(batch, groups * channels, points)
        torch.testing.assert_close(found[0], plain.transpose(1, 2))


@pytest.mark.parametrize("backend", [pytest.param("native", marks=NEEDS_NATIVE), "torch"])
def test_sampling_reads_maps_bilinearly_in_full_precision(backend):
    x = torch.arange(12.0).view(1, 3, 4, 1).repeat(2, 1, 1, 10)
    positions = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0], [3.0, 0.0]]).expand(2, 2, 4, 2)
    expected = torch.tensor([0.0, 11.0, 5.5, 0.0]).view(4, 1).expand(2, 4, 10)
    with ops.use_backend(backend):
        torch.testing.assert_close(ops.sample(x, positions), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            narrow = ops.sample(x.bfloat16(), positions)
        with pytest.raises(ValueError, match="sample needs"):
            ops.sample(x, positions[:1])
        with pytest.raises(ValueError, match="sample needs"):
            ops.sample(x[..., :9], positions)
        for empty in (x[:, :0], x[:, :, :0]):
            with pytest.raises(ValueError, match="none of them empty"):
                ops.sample(empty, positions)
        with pytest.raises(ValueError, match="none of them empty"):
            ops.sample(x, positions[:, :0])
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.window_attention(torch.zeros(1, 2, 9, 24), torch.zeros(2, 3, 3), None, 2),
        lambda: ops.window_attention(torch.zeros(1, 2, 9, 24), torch.zeros(5, 9, 9), None, 5),
        lambda: ops.window_attention(torch.zeros(1, 2, 9, 0), torch.zeros(2, 9, 9), None, 2),
        lambda: ops.window_attention(torch.zeros(1, 2, 9, 24), torch.zeros(2, 9, 9), torch.zeros(1, 9, 9), 2),
        lambda: ops.depthwise_conv(torch.zeros(1, 9, 9, 24), torch.zeros(5, 1, 3, 3), torch.zeros(5)),
        lambda: ops.depthwise_conv(torch.zeros(1, 9, 9, 24), torch.zeros(24, 1, 3, 3), torch.zeros(1)),
        lambda: ops.depthwise_conv(torch.zeros(1, 9, 9, 24), torch.zeros(24, 1, 3, 3), torch.zeros(24), 0),
    ],
)
def test_shapes_that_would_be_read_beyond_their_memory_are_refused(call):
    with pytest.raises(ValueError, match=r"(window_attention|depthwise_conv) needs"):
        call()


@NEEDS_NATIVE
def test_a_position_that_is_no_number_is_not_hidden():
    x, positions = torch.ones(1, 3, 3, 2), torch.zeros(1, 1, 2, 2)
    positions[0, 0, 1, 0] = float("nan")
    with ops.use_backend("native"):
        assert ops.sample(x, positions).isnan().any(-1).tolist() == [[False, True]]


@NEEDS_NATIVE
@settings(max_examples=40, deadline=None)
@given(
    **MAPS,
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    kernel=st.sampled_from([1, 3, 5, 7, 9]),
    stride=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 99),
)
def test_depthwise_convolution_is_conv2d(batch, groups, channels, height, width, kernel, stride, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, height, width, groups * channels, generator=draw, dtype=torch.float64)
    weight = torch.randn(channels, 1, kernel, kernel, generator=draw, dtype=torch.float64)
    bias = torch.randn(channels, generator=draw, dtype=torch.float64)
    found, wanted = both(lambda *tensors: ops.depthwise_conv(*tensors, stride), x, weight, bias)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@NEEDS_NATIVE
@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 2),
    windows=st.integers(1, 3),
    heads=st.integers(1, 3),
    area=st.sampled_from([1, 4, 9, 49, 64]),
    dim=st.sampled_from([1, 8, 20, 32]),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_window_attention_is_softmax_of_biased_scores(batch, windows, heads, area, dim, masked, seed):
    draw = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, windows, area, 3 * heads * dim, generator=draw, dtype=torch.float64)
    bias = torch.randn(heads, area, area, generator=draw, dtype=torch.float64)
    mask = None
    if masked:
        region = torch.randint(3, (windows, area), generator=draw)
        mask = (region[:, :, None] != region[:, None]).float() * -100
    found, wanted = both(lambda *tensors: ops.window_attention(*tensors, mask, heads), qkv, bias)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    q, k, v = qkv.view(batch, windows, area, 3, heads, dim).permute(3, 0, 1, 4, 2, 5)
    logits = q @ k.transpose(-2, -1) * dim**-0.5 + bias
    if mask is not None:
        logits = logits + mask[:, None]
    plain = (logits.softmax(-1) @ v).transpose(2, 3).reshape(batch, windows, area, heads * dim)
    torch.testing.assert_close(found[0], plain)


@NEEDS_NATIVE
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bf16_is_rounded_as_seldom_as_can_be_and_threads_change_nothing(threads):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 5, 48, generator=draw).bfloat16()
    positions = torch.rand(2, 3, 7, 2, generator=draw) * 2 - 1
    weight, bias = torch.randn(16, 1, 5, 5, generator=draw), torch.randn(16, generator=draw)
    pairs = torch.randn(2, 9, 9, generator=draw)
    qkv = torch.randn(2, 3, 9, 48, generator=draw).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with ops.use_backend("native"):
            sampled, convolved = ops.sample(x, positions), ops.depthwise_conv(x, weight, bias)
            wide = ops.sample(x.float(), positions), ops.depthwise_conv(x.float(), weight, bias)
            attended = ops.window_attention(qkv, pairs, None, 2)
            wide_attended = ops.window_attention(qkv.float(), pairs, None, 2)
            torch.set_num_threads(1)
            alone = ops.window_attention(qkv, pairs, None, 2)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(sampled, wide[0].bfloat16()) and torch.equal(convolved, wide[1].bfloat16())
    assert torch.equal(attended, alone)
    # Once more where the CPU multiplies pairs of bf16: the weights, before the product with v.
    assert (attended - wide_attended).abs().max() <= 2**-8 * qkv[..., 32:].abs().max()


@NEEDS_NATIVE
@pytest.mark.parametrize("function", ["sample", "depthwise_conv", "window_attention"])
def test_they_are_whole_torch_operators(function):
    x = torch.randn(2, 4, 4, 6, dtype=torch.float64, requires_grad=True)
    positions = (torch.rand(2, 2, 5, 2, dtype=torch.float64) * 2 - 1).requires_grad_()
    weight = torch.randn(3, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    qkv = torch.randn(2, 3, 4, 12, dtype=torch.float64, requires_grad=True)
    pairs = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    operator, inputs = {
        "sample": (torch.ops.dattrain.sample, (x, positions, "native")),
        "depthwise_conv": (torch.ops.dattrain.depthwise_conv, (x, weight, bias, 2)),
        "window_attention": (torch.ops.dattrain.window_attention, (qkv, pairs, None, 2)),
    }[function]
    torch.library.opcheck(operator, inputs)

    def first(*arguments):
        out = operator(*arguments)
        return out if isinstance(out, Tensor) else out[0]

    assert torch.autograd.gradcheck(first, inputs)


@NEEDS_NATIVE
def test_torch_counts_their_flops_as_it_counts_its_own():
    from torch.utils.flop_counter import FlopCounterMode

    x, weight, bias = torch.randn(2, 6, 5, 8), torch.randn(4, 1, 3, 3), torch.randn(4)
    # Of the CPU's fused attention torch counts nothing; a bias that needs gradients does not go there.
    qkv, pairs = torch.randn(2, 3, 9, 24), torch.randn(2, 9, 9, requires_grad=True)
    counts = []
    for backend in ("native", "torch"):
        with ops.use_backend(backend), FlopCounterMode(display=False) as counter:
            ops.depthwise_conv(x, weight, bias, 2), ops.window_attention(qkv, pairs, None, 2)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.sample(torch.randn(1, 5, 5, 8), torch.zeros(1, 2, 0, 2)),
        lambda: ops.sample(torch.ones(1, 5, 5, 8, dtype=torch.int64), torch.zeros(1, 2, 3, 2)),
        lambda: ops.sample(torch.randn(1, 5, 5, 8), torch.zeros(1, 2, 3, 2, device="meta")),
        lambda: ops.depthwise_conv(torch.zeros(1, 5, 5, 0), torch.randn(4, 1, 3, 3), torch.randn(4)),
        lambda: ops.depthwise_conv(torch.zeros(1, 5, 5, 8), torch.randn(4, 1, 4, 4), torch.randn(4)),
        lambda: ops.depthwise_conv(torch.zeros(1, 5, 5, 8), torch.randn(4, 1, 3, 3), torch.randn(4, device="meta")),
        lambda: ops.window_attention(torch.randn(1, 2, 4, 24), torch.randn(2, 4, 4, device="meta"), None, 2),
        lambda: ops.biased_attention(torch.randn(1, 1, 2, 8), torch.randn(1, 1, 300, 8), torch.randn(1, 1, 2, 8), None),
        lambda: ops.biased_attention(*torch.randn(3, 1, 1, 2, 8), torch.randn(1, 1, 2, 5)),
    ],
)  # fmt: skip
def test_what_would_read_other_memory_is_refused(call):
    with pytest.raises(ValueError, match="needs|one device|broadcast"):
        call()
