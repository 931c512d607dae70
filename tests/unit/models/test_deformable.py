"""Deformable attention against the paper's equations, written out here pair by pair and channel by channel."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dattrain import ops
from dattrain.models.attention import WindowAttention, relative_bias
from dattrain.models.deformable import Conventions, DeformableAttention, reference_points

CVPR = Conventions()
DATPP = Conventions(offset_range="clamp", reference="shifted", query_grid="corner")
PAPER = Conventions(reference="corner", query_grid="corner")


def axis(size: int, kind: str) -> Tensor:
    index = torch.arange(size, dtype=torch.float64)
    if kind == "center":
        return 2 * (index + 0.5) / size - 1
    return 2 * (index + (0.5 if kind == "shifted" else 0)) / max(size - 1, 1) - 1


def grid(height: int, width: int, kind: str) -> Tensor:
    return torch.stack(torch.meshgrid(axis(height, kind), axis(width, kind), indexing="ij"), -1)


def written_out(module: DeformableAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and positions, from B x C x H x W maps with groups folded into the batch and every matrix materialised."""
    rules, groups, heads = module.conventions, module.groups, module.heads
    batch, height, width, dim = x.shape
    maps = x.permute(0, 3, 1, 2)
    q = F.conv2d(maps, module.q.weight[:, :, None, None], module.q.bias)
    network = module.offset
    folded = q.reshape(batch * groups, dim // groups, height, width)
    kernel = network.conv.kernel_size[0]
    features = F.conv2d(
        folded, network.conv.weight, network.conv.bias, module.stride, kernel // 2, groups=dim // groups
    )
    features = F.layer_norm(
        features.permute(0, 2, 3, 1), (dim // groups,), network.norm.weight, network.norm.bias
    )
    offset = F.gelu(features) @ network.proj.weight.t()
    rows, columns = offset.shape[1:3]
    reference = grid(rows, columns, rules.reference)
    if isinstance(rules.offset_range, float):
        points = reference + rules.offset_range * offset.tanh() / torch.tensor([rows, columns])
    elif rules.offset_range == "clamp":
        points = (reference + offset).clamp(-1, 1)
    else:
        points = (reference + offset).tanh() if rules.offset_range == "tanh" else reference + offset
    folded = maps.reshape(batch * groups, dim // groups, height, width)
    sampled = F.grid_sample(folded, points.flip(-1), align_corners=True).reshape(
        batch, dim, 1, rows * columns
    )
    weight_k, weight_v = module.kv.weight[:, :, None, None].chunk(2)
    bias_k, bias_v = module.kv.bias.chunk(2)
    k, v = F.conv2d(sampled, weight_k, bias_k), F.conv2d(sampled, weight_v, bias_v)
    q, k, v = (each.reshape(batch * heads, dim // heads, -1) for each in (q, k, v))
    logits = torch.einsum("bcm,bcn->bmn", q, k) * (dim // heads) ** -0.5
    if module.bias_table is not None:
        queries = grid(height, width, rules.query_grid).reshape(1, -1, 1, 2)
        displacement = (queries - points.reshape(batch * groups, 1, -1, 2)) / 2
        table = module.bias_table.expand(batch, -1, -1, -1).reshape(
            batch * groups, heads // groups, *module.bias_table.shape[1:]
        )
        bias = F.grid_sample(table, displacement.flip(-1), align_corners=True)
        logits = logits + bias.reshape(logits.shape)
    out = torch.einsum("bmn,bcn->bcm", logits.softmax(-1), v).reshape(batch, dim, height, width)
    out = F.conv2d(out, module.proj.weight[:, :, None, None], module.proj.bias)
    return out.permute(0, 2, 3, 1), points.reshape(batch, groups, rows, columns, 2)


CASES = [
    # height, width of the map, of the table, heads, groups, kernel, stride
    (6, 6, (6, 6), 4, 2, 5, 1),
    (7, 5, (7, 5), 4, 1, 3, 1),
    (8, 6, (8, 6), 4, 4, 7, 2),
    (9, 5, (6, 6), 2, 2, 9, 4),
    (1, 4, (3, 3), 2, 1, 3, 1),
]
RULES = {
    "cvpr": CVPR,
    "datpp": DATPP,
    "paper": PAPER,
    "free": Conventions(offset_range="free"),
    "tanh": Conventions(offset_range="tanh"),
    "no bias": Conventions(position="none"),
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(rules, case):
    height, width, size, heads, groups, kernel, stride = case
    torch.manual_seed(0)
    module = DeformableAttention(8 * heads, heads, groups, size, kernel, stride, RULES[rules]).double()
    with torch.no_grad():
        module.offset.proj.weight.mul_(6)
        if module.bias_table is not None:
            module.bias_table.normal_()
    x = torch.randn(2, height, width, 8 * heads, dtype=torch.float64, requires_grad=True)
    inputs = [x, *module.parameters()]
    cotangent = torch.randn(2, height, width, 8 * heads, dtype=torch.float64)
    expected, points = written_out(module, x)
    wanted = torch.autograd.grad((expected * cotangent).sum(), inputs)
    for backend in ("reference", "torch"):
        with ops.use_backend(backend):
            out = module(x)
            gradients = torch.autograd.grad((out * cotangent).sum(), inputs)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(module.offset(module.q(x)), points, rtol=1e-10, atol=1e-12)
        for name, ours, theirs in zip(["x", *dict(module.named_parameters())], gradients, wanted):
            scale = float(theirs.abs().max())
            assert float((ours - theirs).abs().max()) <= 1e-10 * scale, f"{name} by {backend}"


def test_reference_points_by_name():
    assert reference_points(4, 1, "center", torch.device("cpu"), torch.float64).flatten().tolist() == [
        -0.75, 0, -0.25, 0, 0.25, 0, 0.75, 0
    ]  # fmt: skip
    corner = reference_points(3, 2, "corner", torch.device("cpu"), torch.float64)
    assert corner[:, 0, 0].tolist() == [-1, 0, 1] and corner[0, :, 1].tolist() == [-1, 1]
    shifted = reference_points(3, 2, "shifted", torch.device("cpu"), torch.float64)
    assert shifted[:, 0, 0].tolist() == [-0.5, 0.5, 1.5]


def test_offsets_stay_within_their_range():
    torch.manual_seed(0)
    module = DeformableAttention(32, 4, 2, (14, 14), 5)
    with torch.no_grad():
        module.offset.proj.weight.mul_(1000)
    moved = module.offset(torch.randn(2, 14, 14, 32)) - module.offset.reference(
        14, 14, torch.device("cpu"), torch.float32
    )
    pixels = moved.detach() * 13 / 2
    assert float(pixels.abs().max()) == pytest.approx(2 / 14 * 13 / 2, rel=1e-5)


def test_relative_bias_is_the_table_at_query_minus_key():
    table = torch.randn(3, 7, 5)
    bias = relative_bias(table, 4, 3)
    for (i, j), (k, l) in itertools.product(itertools.product(range(4), range(3)), repeat=2):
        assert torch.equal(bias[:, i * 3 + j, k * 3 + l], table[:, i - k + 3, j - l + 2])


@pytest.mark.parametrize(("shift", "by"), [(None, 0), ("ceil", 2), ("floor", 1)])
def test_windows_attend_within_their_region(shift, by):
    """Each output depends on exactly the tokens of its window that were neighbours before the roll."""
    torch.manual_seed(0)
    module = WindowAttention(8, 2, (3, 3), shift)
    x = torch.randn(1, 6, 9, 8, requires_grad=True)
    out = module(x)

    def window(row: int, column: int) -> tuple[int, int]:
        # Rolling by -by puts row r at (r - by) mod size; the first `by` rows are then their own region of the last window.
        return tuple(-1 if at < by else (at - by) // 3 for at in (row, column))

    for row, column in ((0, 0), (1, 4), (5, 8), (2, 2)):
        (gradient,) = torch.autograd.grad(out[0, row, column].sum(), x, retain_graph=True)
        reached = gradient[0].abs().sum(-1) > 1e-12
        for i, j in itertools.product(range(6), range(9)):
            assert bool(reached[i, j]) == (window(i, j) == window(row, column)), (row, column, i, j)
