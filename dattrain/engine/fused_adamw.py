"""torch's fused AdamW on a CPU, such that what becomes of an element depends on its own numbers alone.

ZeRO cuts the flat tensors elsewhere at every world size, and what comes out must be the same bits. torch's kernel
(ATen/native/cpu/FusedAdamKernel.cpp) goes through a tensor in whole vectors and rounds the last ``numel % width`` elements,
which are computed one by one, in another way (the average of squares, with AVX2 and AVX512). It also goes by memory, not by
index: of a weight in channels-last and a gradient that is not, it would update the wrong elements. So it is given whole vectors
of plain memory only; what is left of all tensors is stepped together, in a copy that is padded to whole vectors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam

UNIT = 64
"""Bytes that the kernel never parts, neither among threads nor, since no vector is longer, into vectors and a rest."""


class Member(NamedTuple):
    """Tensors of one shape and dtype that belong together, and how often they were stepped before (a scalar, left as it is)."""

    weights: Tensor
    gradient: Tensor
    average: Tensor
    squares: Tensor
    steps: Tensor


@torch.no_grad()
def step(
    members: Iterable[Member],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One update of ``members``, on the CPU, in place: weights and both averages, not the counts.

    An element's result is the same bits wherever it lies in its tensor, whatever the layout and the number of threads.
    """
    whole: list[Member] = []
    rests: dict[tuple[float, torch.dtype], list[Member]] = {}
    for member in members:
        *tensors, steps = member
        flat = _in_memory_order(tensors)
        vectors = flat[0].numel() - flat[0].numel() % (UNIT // flat[0].element_size()) if flat else 0
        if vectors:
            whole.append(Member._make([*(t[:vectors] for t in flat), steps.clone()]))
        if vectors < tensors[0].numel():
            rest = Member._make([*(t[vectors:] for t in flat), steps]) if flat else member
            rests.setdefault((float(steps), tensors[0].dtype), []).append(rest)
    padded = [_padded(rest) for rest in rests.values()]
    every = [*whole, *padded]
    if not every:
        return
    weights, gradients, averages, squares, counts = (list(column) for column in zip(*every))
    adam(
        weights, gradients, averages, squares, [], counts,
        fused=True, decoupled_weight_decay=True, amsgrad=False, maximize=False,
        lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay,
    )  # fmt: skip
    for stepped, sources in zip(padded, rests.values()):
        _give_back(stepped, sources)


def _in_memory_order(tensors: list[Tensor]) -> list[Tensor]:
    """``tensors`` as flat views whose elements correspond; nothing where they do not all lie in memory in one way."""
    if all(t.is_contiguous() for t in tensors):
        return [t.view(-1) for t in tensors]
    if all(t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) for t in tensors):
        return [t.permute(0, 2, 3, 1).view(-1) for t in tensors]
    return []


def _padded(rest: list[Member]) -> Member:
    """``rest`` end to end, in new memory, with zeros up to whole vectors."""
    first = rest[0].weights
    zeros = first.new_zeros(-sum(member.weights.numel() for member in rest) % (UNIT // first.element_size()))
    columns = list(zip(*rest))[:-1]
    joined = [torch.cat([*(t.reshape(-1) for t in column), zeros]) for column in columns]
    return Member._make([*joined, rest[0].steps.clone()])


def _give_back(stepped: Member, rest: list[Member]) -> None:
    """Copy what ``_padded`` put together, all but gradients, to where it came from."""
    sizes = [member.weights.numel() for member in rest]
    for name in ("weights", "average", "squares"):
        targets = [getattr(member, name) for member in rest]
        pieces = getattr(stepped, name)[: sum(sizes)].split(sizes)
        torch._foreach_copy_(targets, [piece.view(t.shape) for piece, t in zip(pieces, targets)])
