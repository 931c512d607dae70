"""Where a model looked: positions of the keys of each deformable block, and how much attention each query gave them.

Read from a forward pass of the model as it is, by wrapping its own attention, so that every convention, backend and map
size shows as it ran. Drawing is in ``draw`` (PNG) and ``html``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dattrain.errors import UserError
from dattrain.models.deformable import DeformableAttention


@dataclass(frozen=True)
class Deformed:
    """One deformable block's view of one image.

    ``stage`` and ``block`` count from 1 and 0 (blocks of the stage, in order). ``positions`` groups x Hk x Wk x 2 and
    ``reference`` Hk x Wk x 2, order y, x, normalised to [-1, 1]. ``map_size`` is (H, W) of the map. ``attention`` heads x
    H*W x Hk*Wk, rows sum to one; None unless asked for.
    """

    stage: int
    block: int
    positions: np.ndarray
    reference: np.ndarray
    map_size: tuple[int, int]
    attention: np.ndarray | None

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
        """Mean attention that each key of a group gets from all queries: Hk*Wk, sums to one."""
        mean: np.ndarray = self.group_attention(group).mean(0)
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
    blocks = [(name, m) for name, m in model.named_modules() if isinstance(m, DeformableAttention)]
    if not blocks:
        raise UserError(
            "this model has no deformable attention to draw (its stages are local or neighbourhood only)"
        )
    seen: dict[str, _Seen] = {name: _Seen() for name, _ in blocks}
    mode = model.training
    model.eval()
    try:
        with torch.no_grad(), ExitStack() as stack:
            for name, module in blocks:
                stack.enter_context(_watch(module, seen[name], attention))
            model(images)
    finally:
        model.train(mode)
    return [[_deformed(name, module, seen[name], i) for name, module in blocks] for i in range(len(images))]


@dataclass
class _Seen:
    positions: Tensor | None = None
    map_size: tuple[int, int] = (0, 0)
    weights: Tensor | None = None


@contextmanager
def _watch(module: DeformableAttention, seen: _Seen, attention: bool) -> Iterator[None]:
    """Within the block, keep the module's positions and, when asked, its attention weights."""

    def keep_positions(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.positions, seen.map_size = output, (args[0].shape[1], args[0].shape[2])

    attend = module._attend

    def keep_weights(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, height: int, width: int) -> Tensor:
        # Attention is linear in v: with one-hot values it returns its own weights, a slice of keys at a time.
        keys, dim = k.shape[2], k.shape[3]
        slices = []
        for first in range(0, keys, dim):
            hot = torch.zeros_like(v)
            count = min(dim, keys - first)
            hot[:, :, torch.arange(first, first + count), torch.arange(count)] = 1
            slices.append(attend(q, k, hot, positions, height, width)[..., :count])
        seen.weights = torch.cat(slices, -1)
        return attend(q, k, v, positions, height, width)

    handle = module.offset.register_forward_hook(keep_positions)
    if attention:
        module._attend = keep_weights  # type: ignore[method-assign]
    try:
        yield
    finally:
        handle.remove()
        module.__dict__.pop("_attend", None)


def _deformed(name: str, module: DeformableAttention, seen: _Seen, image: int) -> Deformed:
    assert seen.positions is not None
    numbers = [int(n) for n in re.findall(r"\d+", name)]
    stage, block = (numbers[0] + 1, numbers[1]) if len(numbers) >= 2 else (1, 0)
    positions = seen.positions[image].float().cpu()
    reference = module.offset.reference(*seen.map_size, positions.device, positions.dtype)
    weights = None if seen.weights is None else seen.weights[image].float().cpu().numpy()
    return Deformed(stage, block, positions.numpy(), reference.numpy(), seen.map_size, weights)


def select(
    blocks: Sequence[Deformed], *, stage: int | None = None, block: int | None = None, every: bool = False
) -> list[Deformed]:
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
