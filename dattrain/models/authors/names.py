"""The names of the authors' code (LeapLabTHU/DAT) beside ours, tensor by tensor.

A ``Link`` joins one of our tensors to one or more of theirs; ``links`` lists those of a module, in the order in which their
state dict holds them. Modules of DAT++ register theirs in ``names_datpp``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import singledispatch
from math import isqrt
from typing import Any, cast

import torch
from torch import Tensor, nn

from dattrain.errors import UserError
from dattrain.models.attention import WindowAttention, shift_mask
from dattrain.models.blocks import Block, Downsample, Mlp, PatchEmbed, Stage
from dattrain.models.dat import DAT
from dattrain.models.deformable import DeformableAttention, SharedDepthwiseConv


@dataclass(frozen=True)
class Link:
    """One of our tensors and those of theirs that hold the same numbers.

    ``ours`` is None for a buffer of theirs that we compute: ``write`` then makes it (from nothing), and a file must hold
    that very value.
    """

    theirs: tuple[str, ...]
    ours: str | None
    read: Callable[[list[Tensor]], Tensor]
    write: Callable[[Tensor], list[Tensor]]


def same(theirs: str, ours: str) -> Iterator[Link]:
    """Weight and bias of a layer that both sides lay out alike."""
    for part in ("weight", "bias"):
        yield Link((f"{theirs}.{part}",), f"{ours}.{part}", lambda them: them[0], lambda us: [us])


def only(theirs: str, ours: str) -> Link:
    """A single tensor that both sides lay out alike."""
    return Link((theirs,), ours, lambda them: them[0], lambda us: [us])


def pointwise(theirs: str, ours: str, *, bias: bool = True) -> Iterator[Link]:
    """Their 1 x 1 convolution is our linear layer."""
    yield Link(
        (f"{theirs}.weight",),
        f"{ours}.weight",
        lambda them: them[0].flatten(1),
        lambda us: [us[:, :, None, None]],
    )
    if bias:
        yield only(f"{theirs}.bias", f"{ours}.bias")


def buffer(theirs: str, make: Callable[[], Tensor]) -> Link:
    """A buffer of theirs that follows from the configuration."""
    return Link((theirs,), None, lambda them: them[0], lambda _: [make()])


@singledispatch
def links(module: nn.Module, theirs: str, ours: str) -> Iterator[Link]:
    """Links of ``module``, whose tensors are named ``theirs.*`` over there and ``ours.*`` here."""
    raise UserError(f"{type(module).__name__} ({ours}) has no counterpart in the authors' code")


@links.register
def _(module: DAT, theirs: str, ours: str) -> Iterator[Link]:
    yield from links(module.patch_embed, "patch_proj", "patch_embed")
    for number, stage in enumerate(module.stages):
        assert isinstance(stage, Stage)
        blocks = [
            (index, cast(Block, block), f"stages.{number}.blocks.{index}")
            for index, block in enumerate(stage.blocks)
        ]
        for index, _, name in blocks:
            yield from same(f"stages.{number}.layer_norms.{2 * index}.norm", f"{name}.norm1")
            yield from same(f"stages.{number}.layer_norms.{2 * index + 1}.norm", f"{name}.norm2")
        for index, block, name in blocks:
            yield from links(block.mlp, f"stages.{number}.mlps.{index}", f"{name}.mlp")
        for index, block, name in blocks:
            if isinstance(block.attn, WindowAttention):
                size = module.map_sizes(module.img_size)[number]
                yield from _window(block.attn, f"stages.{number}.attns.{index}", f"{name}.attn", size)
            else:
                yield from links(block.attn, f"stages.{number}.attns.{index}", f"{name}.attn")
        for index, block, name in blocks:
            if block.local is not None:
                yield from links(
                    block.local, f"stages.{number}.local_perception_units.{index}", f"{name}.local"
                )
    for number, stage in enumerate(module.stages):
        if number:
            assert isinstance(stage, Stage)
            yield from links(stage.downsample, f"down_projs.{number - 1}", f"stages.{number}.downsample")
    yield from same("cls_norm.norm", "norm")
    if module.num_classes:
        yield from same("cls_head", "head.fc")


@links.register
def _(module: PatchEmbed, theirs: str, ours: str) -> Iterator[Link]:
    yield from same(f"{theirs}.0", f"{ours}.proj")
    yield from same(f"{theirs}.1.norm", f"{ours}.norm")


@links.register
def _(module: Downsample, theirs: str, ours: str) -> Iterator[Link]:
    yield only(f"{theirs}.0.weight", f"{ours}.conv.weight")
    yield from same(f"{theirs}.1.norm", f"{ours}.norm")


@links.register
def _(module: Mlp, theirs: str, ours: str) -> Iterator[Link]:
    yield from same(f"{theirs}.chunk.linear1", f"{ours}.fc1")
    yield from same(f"{theirs}.chunk.linear2", f"{ours}.fc2")


def _window(module: WindowAttention, theirs: str, ours: str, size: tuple[int, int]) -> Iterator[Link]:
    (wh, ww), heads = module.window, module.heads

    def read(them: list[Tensor]) -> Tensor:
        side = isqrt(them[0].shape[0])
        if side * side != them[0].shape[0]:
            raise UserError(
                f"{theirs}.relative_position_bias_table has {them[0].shape[0]} rows, not a square window's"
            )
        return them[0].t().reshape(heads, side, side)

    yield Link(
        (f"{theirs}.relative_position_bias_table",),
        f"{ours}.bias_table",
        read,
        lambda us: [us.flatten(1).t()],
    )
    yield buffer(f"{theirs}.relative_position_index", lambda: relative_position_index(wh, ww))
    if module.shift is not None:
        height, width = (-(-side // window) * window for side, window in zip(size, module.window))
        yield buffer(
            f"{theirs}.attn_mask",
            lambda: shift_mask(height, width, module.window, module.shift_size, torch.device("cpu")),
        )
    yield from same(f"{theirs}.proj_qkv", f"{ours}.qkv")
    yield from same(f"{theirs}.proj_out", f"{ours}.proj")


@links.register
def _(module: DeformableAttention, theirs: str, ours: str) -> Iterator[Link]:
    if module.bias_table is not None:
        yield only(f"{theirs}.rpe_table", f"{ours}.bias_table")
    yield from same(f"{theirs}.conv_offset.0", f"{ours}.offset.conv")
    yield from same(f"{theirs}.conv_offset.1.norm", f"{ours}.offset.norm")
    yield from pointwise(f"{theirs}.conv_offset.3", f"{ours}.offset.proj", bias=False)
    yield from pointwise(f"{theirs}.proj_q", f"{ours}.q")
    for part in ("weight", "bias"):
        yield Link(
            (f"{theirs}.proj_k.{part}", f"{theirs}.proj_v.{part}"),
            f"{ours}.kv.{part}",
            lambda them: torch.cat(them).flatten(1) if them[0].dim() > 1 else torch.cat(them),
            lambda us: list((us[:, :, None, None] if us.dim() > 1 else us).chunk(2)),
        )
    yield from pointwise(f"{theirs}.proj_out", f"{ours}.proj")
    if module.position_conv is not None:
        yield from same(f"{theirs}.rpe_table", f"{ours}.position_conv")


@links.register
def _(module: SharedDepthwiseConv, theirs: str, ours: str) -> Iterator[Link]:
    yield from same(theirs, ours)


def relative_position_index(height: int, width: int) -> Tensor:
    """Row of the flattened table for every (query, key) of a window, area x area, int64 (Swin's buffer)."""
    y = torch.arange(height).repeat_interleave(width)
    x = torch.arange(width).repeat(height)
    rows = y[:, None] - y + height - 1
    return rows * (2 * width - 1) + x[:, None] - x + width - 1


def read_all(state: Mapping[str, Tensor], model: DAT) -> dict[str, Tensor]:
    """Their tensors under our names. Tables keep the size that they have in ``state``.

    Raises:
        UserError: a tensor is missing, left over, or not laid out as expected; a buffer holds other values than this
            model computes (another window or shift convention).
    """
    expected, ours = {name: parameter.shape for name, parameter in model.named_parameters()}, {}
    left = dict(state)
    missing = []
    for link in links(model, "", ""):
        found = [left.pop(name) for name in link.theirs if name in left]
        if len(found) < len(link.theirs):
            # A buffer may be missing: files that were slimmed for release leave them out.
            missing += [name for name in link.theirs if name not in state and link.ours is not None]
        elif link.ours is None:
            made = link.write(found[0])[0]
            if made.shape == found[0].shape and not torch.equal(made, found[0].to(made.dtype)):
                raise UserError(f"{link.theirs[0]} does not hold the values that windows of this model give")
        else:
            tensor = link.read(found)
            if "bias_table" not in link.ours and tensor.shape != expected[link.ours]:
                raise UserError(
                    f"{', '.join(link.theirs)} gives {link.ours} of shape {tuple(tensor.shape)}, not {tuple(expected[link.ours])}"
                )
            ours[link.ours] = tensor
    if missing or left:
        raise UserError(f"not a checkpoint of this model: missing {some(missing)}; left over {some(left)}")
    return ours


def write_all(model: DAT) -> dict[str, Tensor]:
    """Our tensors under their names, in the order of their state dict, buffers included; on the CPU, contiguous."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    theirs = {}
    for link in links(model, "", ""):
        source = torch.empty(0) if link.ours is None else state.pop(link.ours)
        for name, tensor in zip(link.theirs, link.write(source)):
            theirs[name] = tensor.cpu().contiguous()
    if state:
        raise UserError(f"these tensors have no counterpart in the authors' code: {some(state)}")
    order: dict[str, list[str]] = {}
    for name in theirs:
        order.setdefault(name.rpartition(".")[0], []).append(name)
    return {name: theirs[name] for names in order.values() for name in names}


def some(names: Iterable[Any]) -> str:
    """The first eight, for a message, and how many more there are."""
    listed = [str(name) for name in names]
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    return ", ".join(listed[:8]) + more if listed else "nothing"
