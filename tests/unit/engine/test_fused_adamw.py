"""torch's fused AdamW on a CPU: the same bits for an element wherever it lies, and the right element in any layout."""

import itertools

import pytest
import torch
from torch import nn
from torch.optim.adam import adam

from dattrain.engine import fused_adamw
from dattrain.engine.fused_adamw import Member
from dattrain.engine.optim import AdamW

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05}
N = 4096  # a multiple of any vector: stepped at once it is whole vectors alone


def fresh():
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(N, generator=generator) for _ in range(3)]
    return [draw[0], draw[1], 0.1 * draw[2], 0.01 * torch.rand(N, generator=generator)]


def torchs(members):
    weights, gradients, averages, squares, steps = (list(column) for column in zip(*members))
    adam(
        weights, gradients, averages, squares, [], [s.clone() for s in steps], fused=True, decoupled_weight_decay=True,
        amsgrad=False, maximize=False, lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.05,
    )  # fmt: skip


def ours(members):
    fused_adamw.step(members, **SETTINGS)


def cut(tensors, borders):
    steps = torch.tensor(6.0)
    return [Member(*(t[a:b] for t in tensors), steps) for a, b in itertools.pairwise([0, *borders, N])]


CUTTINGS = [
    *([start] for start in (1, 2, 7, 8, 9, 15, 16, 17, 33, 1001)),
    list(range(3, N, 7)),  # no whole vector anywhere
    [5, 5, 30, 67, 100, 1000, 1001, 3000],  # into nothing, into one element
]


def differing(update, cuttings):
    """Elements, of all cuttings, which are not what torch's update makes of them in one piece of whole vectors."""
    whole = fresh()
    torchs(cut(whole, []))
    found = 0
    for borders in cuttings:
        parts = fresh()
        update(cut(parts, borders))
        found += sum(int((a != b).sum()) for a, b in zip(parts, whole))
    return found


@pytest.mark.parametrize("threads", [1, 2])
def test_an_elements_bits_do_not_depend_on_how_the_tensor_is_cut(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert differing(ours, CUTTINGS) == 0
        if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
            assert differing(torchs, CUTTINGS[-1:]) > 0  # or there is nothing here to be careful of any more
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "layouts", itertools.product([torch.contiguous_format, torch.channels_last], repeat=2)
)
def test_weight_and_gradient_need_not_lie_in_memory_alike(layouts):
    torch.manual_seed(0)
    start = torch.randn(5, 3, 3, 3)
    weight, other = nn.Parameter(start.to(memory_format=layouts[0], copy=True)), nn.Parameter(start.clone())
    optimizer, theirs = AdamW([weight], fused=True, **SETTINGS), torch.optim.AdamW([other], **SETTINGS)
    for _ in range(3):
        other.grad = torch.randn_like(other)
        weight.grad = other.grad.to(memory_format=layouts[1], copy=True)
        optimizer.step()
        theirs.step()
    torch.testing.assert_close(weight.detach(), other.detach(), rtol=1e-6, atol=1e-7)
    assert weight.is_contiguous(memory_format=layouts[0])


def test_parameters_that_were_stepped_less_often_keep_their_own_count():
    torch.manual_seed(0)
    pairs = [(nn.Parameter(x), nn.Parameter(x.clone())) for x in (torch.randn(21), torch.randn(7))]
    settings = {**SETTINGS, "foreach": False}
    optimizer = AdamW([p for p, _ in pairs], fused=True, **SETTINGS)
    theirs = torch.optim.AdamW([q for _, q in pairs], **settings)
    for update in range(4):
        for index, (p, q) in enumerate(pairs):
            p.grad = torch.randn_like(p) if index <= update else None
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        theirs.step()
    assert [float(optimizer.state[p]["step"]) for p, _ in pairs] == [4, 3]
    for p, q in pairs:
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-7)
