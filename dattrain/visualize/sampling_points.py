"""Where a model looked: positions of the keys of each deformable block, and how much attention each query gave them.

Read from a forward pass of the model as it is, by wrapping its own attention, so that every convention, backend and map
size shows as it ran. Drawing is in ``draw`` (PNG) and ``html``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from dattrain.errors import UserError
from dattrain.models.deformable import DeformableAttention


class Place(NamedTuple):
    """Of a block: its stage, from 1, and which of the stage's blocks it is, from 0."""

    stage: int
    block: int


@dataclass(frozen=True)
class Deformed:
    """One deformable block's view of one image.

    ``stage`` and ``block`` count from 1 and 0 (blocks of the stage, in order). ``positions`` groups x Hk x Wk x 2 and
    ``reference`` Hk x Wk x 2, order y, x, normalised to [-1, 1]. ``map_size`` is (H, W) of the map. ``attention`` heads x
    H*W x Hk*Wk, rows sum to one; None unless asked for. ``weights`` groups x Hk*Wk is the mean attention that each key gets from
    the queries that ``attended`` was asked about, each group's sums to one; None without it.
    """

    stage: int
    block: int
    positions: np.ndarray
    reference: np.ndarray
    map_size: tuple[int, int]
    attention: np.ndarray | None
    weights: np.ndarray | None = None

    @property
    def groups(self) -> int:
        """Offset groups."""
        return len(self.positions)

    def group_attention(self, group: int) -> np.ndarray:
        """Attention averaged over the heads of a group: H*W x Hk*Wk."""
        if self.attention is None:
            raise ValueError("attention was not captured")
        heads = self.attention.shape[0] // self.groups
        mean: np.ndarray = self.attention[group * heads : (group + 1) * heads].mean(0)
        return mean

    def received(self, group: int) -> np.ndarray:
        """Mean attention that each key of a group gets, from all queries or those of ``weights``: Hk*Wk, sums to one."""
        mean: np.ndarray = (
            self.group_attention(group).mean(0) if self.weights is None else self.weights[group]
        )
        return mean

    def pixels(self, points: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
        """Normalised (y, x) points of this block on an image of (height, width), in pixels whose centres are at .5.

        Sampling aligns corners: -1 and 1 are the centres of the map's first and last token, half a token inside the image.
        """
        size = np.asarray(self.map_size, dtype=np.float64)
        token = (np.asarray(points, dtype=np.float64) + 1) / 2 * (size - 1) + 0.5
        pixels: np.ndarray = token * np.asarray(image_size) / size
        return pixels


def capture(model: nn.Module, images: Tensor, *, attention: bool = False) -> list[list[Deformed]]:
    """Run the model in evaluation mode and return, per image, what its deformable blocks did, in order of depth.

    Args:
        model: a DAT or DAT++; its mode is restored afterwards.
        images: B x C x H x W as the model takes them (normalised), on its device.
        attention: also keep the attention weights (heads x queries x keys float32 numbers per block).

    Raises:
        UserError: the model has no deformable attention.
    """
    blocks = _deformable(model)
    seen: dict[str, _Seen] = {name: _Seen() for name, _ in blocks}
    with _evaluated(model) as stack:
        for name, module in blocks:
            stack.enter_context(_keep_positions(module, seen[name]))
            if attention:
                stack.enter_context(_replaced(module, _weighed(module._attend, seen[name])))
        model(images)
    return [
        [_deformed(_place(name), module, seen[name], i) for name, module in blocks]
        for i in range(len(images))
    ]


def attended(
    model: nn.Module,
    images: Tensor,
    queries: Callable[[int, int], Tensor],
    choose: Callable[[Sequence[Place]], Sequence[Place]],
) -> list[Deformed]:
    """Deformable blocks for one image with their ``weights``: what the chosen queries attend to.

    Takes the memory of an update of one block, where ``capture`` lays out heads x queries x keys numbers for every block: those of an
    image of 800 x 1333 would be gigabytes.

    Args:
        model: a DAT or DAT++, or a backbone of one; its mode is restored afterwards.
        images: 1 x C x H x W as the model takes it (normalised), on its device.
        queries: called with the height and width of a block's map; gives the weight of each query there, H*W, at least one above 0.
        choose: which of the model's deformable blocks, as ``select`` does.

    Raises:
        UserError: the model has no deformable attention, or no block that was asked for.
    """
    modules = {_place(name): module for name, module in _deformable(model)}
    seen = {place: _Seen() for place in choose(list(modules))}
    with _evaluated(model) as stack:
        for place, each in seen.items():
            module = modules[place]
            stack.enter_context(_keep_positions(module, each))
            stack.enter_context(_replaced(module, _received(module._attend, each, queries)))
        model(images)
    return [_deformed(place, modules[place], each, 0) for place, each in seen.items()]


def _deformable(model: nn.Module) -> list[tuple[str, DeformableAttention]]:
    blocks = [(name, m) for name, m in model.named_modules() if isinstance(m, DeformableAttention)]
    if not blocks:
        raise UserError(
            "this model has no deformable attention to draw (its stages are local or neighbourhood only)"
        )
    return blocks


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[ExitStack]:
    """Within the block the model is in evaluation mode, without gradients."""
    mode = model.training
    model.eval()
    try:
        with torch.no_grad(), ExitStack() as stack:
            yield stack
    finally:
        model.train(mode)


@dataclass
class _Seen:
    positions: Tensor | None = None
    map_size: tuple[int, int] = (0, 0)
    attention: Tensor | None = None
    """B x heads x queries x keys."""
    received: Tensor | None = None
    """B x heads x keys, rows sum to one."""


@contextmanager
def _keep_positions(module: DeformableAttention, seen: _Seen) -> Iterator[None]:
    """Within the block, the module's positions and the size of its map are kept."""

    def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.positions, seen.map_size = output, (args[0].shape[1], args[0].shape[2])

    handle = module.offset.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _replaced(module: DeformableAttention, attend: Callable[..., Tensor]) -> Iterator[None]:
    """Within the block, the module attends by ``attend``."""
    module._attend = attend  # type: ignore[method-assign]
    try:
        yield
    finally:
        module.__dict__.pop("_attend", None)


def _weighed(attend: Callable[..., Tensor], seen: _Seen) -> Callable[..., Tensor]:
    """``attend``, which keeps its weights too."""

    def keep(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, height: int, width: int) -> Tensor:
        # Attention is linear in v: with one-hot values it returns its own weights, a slice of keys at a time.
        keys, dim = k.shape[2], k.shape[3]
        slices = []
        for first in range(0, keys, dim):
            hot = torch.zeros_like(v)
            count = min(dim, keys - first)
            hot[:, :, torch.arange(first, first + count), torch.arange(count)] = 1
            slices.append(attend(q, k, hot, positions, height, width)[..., :count])
        seen.attention = torch.cat(slices, -1)
        return attend(q, k, v, positions, height, width)

    return keep


def _received(
    attend: Callable[..., Tensor], seen: _Seen, queries: Callable[[int, int], Tensor]
) -> Callable[..., Tensor]:
    """``attend``, which keeps too what each key gets from the queries."""

    def keep(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, height: int, width: int) -> Tensor:
        # Since attention is linear in v, the derivative of a weighted sum of its outputs is what the weighted queries give each key.
        share = queries(height, width).to(q.device, torch.float32)
        with torch.enable_grad():
            values = torch.zeros_like(v).requires_grad_()
            total = (
                attend(q, k, values, positions, height, width)[..., 0].float() * (share / share.sum())
            ).sum()
            (seen.received,) = torch.autograd.grad(total, values)
        seen.received = seen.received[..., 0]
        return attend(q, k, v, positions, height, width)

    return keep


def _place(name: str) -> Place:
    numbers = [int(n) for n in re.findall(r"\d+", name)]
    return Place(numbers[0] + 1, numbers[1]) if len(numbers) >= 2 else Place(1, 0)


def _deformed(place: Place, module: DeformableAttention, seen: _Seen, image: int) -> Deformed:
    assert seen.positions is not None
    positions = seen.positions[image].float().cpu()
    reference = module.offset.reference(*seen.map_size, positions.device, positions.dtype)
    attention = None if seen.attention is None else seen.attention[image].float().cpu().numpy()
    weights = None
    if seen.received is not None:
        weights = seen.received[image].float().unflatten(0, (len(positions), -1)).mean(1).cpu().numpy()
    return Deformed(*place, positions.numpy(), reference.numpy(), seen.map_size, attention, weights)


def token_at(query: tuple[float, float], map_size: tuple[int, int]) -> int:
    """The token (row-major) of a map that holds the point (y, x), given as fractions of its height and width."""
    height, width = map_size
    row, column = (min(max(int(f * n), 0), n - 1) for f, n in zip(query, (height, width)))
    return row * width + column


AnyBlock = TypeVar("AnyBlock", Deformed, Place)


def select(
    blocks: Sequence[AnyBlock], *, stage: int | None = None, block: int | None = None, every: bool = False
) -> list[AnyBlock]:
    """Blocks of a stage (1-4), of a place in it, or the last deformable block of each stage; all with ``every``.

    Raises:
        UserError: there is no such block; the message lists those that there are.
    """
    chosen = [b for b in blocks if stage in (None, b.stage) and block in (None, b.block)]
    if not chosen:
        there = ", ".join(f"stage {b.stage} block {b.block}" for b in blocks)
        raise UserError(f"no deformable block at stage {stage}, block {block}; this model has {there}")
    if every or block is not None:
        return chosen
    return list({b.stage: b for b in chosen}.values())
