"""timm's Swin and PVT v2, run stage by stage so that drop path reads its sample's noise, also when a block is recomputed.

timm's own loops cannot hand anything to a block, and its DropPath draws from torch's generator.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import pvt_v2
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn

from dattrain.errors import UserError
from dattrain.models.blocks import has_dropout, recompute
from dattrain.models.zoo import VARIANTS

FAMILIES = ("swin_", "pvt_v2_")
"""How the names begin that this module builds."""
BUFFERS = ("relative_position_index", "attn_mask")
"""What files of Swin hold beside weights."""


class DropPath(nn.Module):
    """Scales a residual branch by what ``run_block`` set for this call; nothing without it."""

    scale: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """B x ... to the same."""
        if self.scale is None:
            return x
        return x * self.scale.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


class PaddedSwinBlock(SwinTransformerBlock):
    """Pads the map to whole windows before it is shifted, as Swin's dense code.

    timm's shifts first: the mask, made for the padded map, then misses the rows and columns that were shifted to the other side,
    and opposite edges of an image attend to each other.
    """

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        rows, columns = self.window_size
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        padded: Tensor = super()._attn(x)  # type: ignore[no-untyped-call]
        return padded[:, :height, :width]


def create(name: str, *, img_size: int | tuple[int, int], in_chans: int, **overrides: Any) -> nn.Module:
    """A network of timm without classifier and final norm, with fresh weights, for images of any size.

    Swin's windows keep the size that they have in its name at every image size, shifted in every second block of every
    stage, and the map is padded to whole ones before the shift, as in Swin's own detection and segmentation code (timm alone would
    not shift where the map of ``img_size`` is no larger than a window, and pads after the shift).

    Raises:
        UserError: no such network, or an override that it does not take.
    """
    if not name.startswith(FAMILIES) or not timm.is_model(name):
        known = [*VARIANTS, *(each for family in FAMILIES for each in timm.list_models(f"{family}*"))]
        close = get_close_matches(name, known, 1)
        raise UserError(
            f"model.name={name!r} is no backbone for dense prediction"
            f"{f' (did you mean {close[0]!r}?)' if close else ''}; there are {', '.join(VARIANTS)}, and timm's swin_* and pvt_v2_*"
        )
    swin = name.startswith("swin_")
    arguments = inspect.signature(
        (SwinTransformer if swin else PyramidVisionTransformerV2).__init__
    ).parameters
    for each in overrides:
        if each not in arguments:
            raise UserError(f"model.overrides.{each} is not an argument of timm's {name}")
    layout = {"img_size": img_size, "strict_img_size": False, "always_partition": True} if swin else {}
    body: Any = timm.create_model(
        name,
        pretrained=False,
        num_classes=0,
        in_chans=in_chans,
        drop_path_rate=0.0,
        **{**layout, **overrides},
    )
    if swin:
        body.norm = nn.Identity()
        for block in blocks(body):
            block.__class__ = PaddedSwinBlock  # the same modules and weights
    for block in blocks(body):
        block.drop_path1, block.drop_path2 = DropPath(), DropPath()
    made: nn.Module = body
    return made


def stages(body: Any) -> list[Any]:
    """The stages, each with ``downsample`` and ``blocks``."""
    return list(body.layers if isinstance(body, SwinTransformer) else body.stages)


def blocks(body: Any) -> list[Any]:
    """All blocks, from the stem on."""
    return [block for stage in stages(body) for block in stage.blocks]


def channels(body: Any) -> tuple[int, ...]:
    """Of the map of each stage."""
    return tuple(each["num_chs"] for each in body.feature_info)


def renamed(body: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the same network under timm's names, whether they have these or those of the authors of Swin and PVT v2.

    Buffers that Swin's files hold are left out; what else does not belong here stays, under its name.
    """
    if not isinstance(body, SwinTransformer):
        found: dict[str, Tensor] = pvt_v2.checkpoint_filter_fn(dict(tensors), body)
        return found
    # Theirs end a stage with the downsampling that begins timm's next.
    later = "layers.0.downsample.reduction.weight" in tensors
    return {
        re.sub(
            r"^layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) + later}.downsample", name
        ): value
        for name, value in tensors.items()
        if not name.endswith(BUFFERS)
    }


def run_block(block: Any, x: Tensor, scale: Tensor | None, *others: Any) -> Tensor:
    """``block(x, *others)`` with its branches scaled by ``scale`` (B x 2): the same when called anew in the backward pass."""
    paths = (block.drop_path1, block.drop_path2)
    for column, path in enumerate(paths):
        path.scale = None if scale is None else scale[:, column]
    try:
        out: Tensor = block(x, *others)
        return out
    finally:
        for path in paths:
            path.scale = None


def run(body: Any, x: Tensor, scale: Tensor | None, recomputed: str | None) -> list[Tensor]:
    """Maps of all stages, B x H x W x C, sides of the image divided by 4, 8, 16, 32 and rounded up.

    Args:
        x: B x in_chans x H x W.
        scale: factors of the residual branches, B x (2 * blocks), or None.
        recomputed: ``stage`` or ``block``: what keeps no activations.
    """
    swin = isinstance(body, SwinTransformer)
    if swin:  # timm refuses what patches do not divide; Swin's dense code pads
        height, width = body.patch_embed.patch_size
        x = F.pad(x, (0, -x.shape[3] % width, 0, -x.shape[2] % height))
    x = body.patch_embed(x)
    run_stage = _swin_stage if swin else _pvt_stage
    maps, first = [], 0
    for stage in stages(body):
        columns = None if scale is None else scale[:, first : first + 2 * len(stage.blocks)]
        first += 2 * len(stage.blocks)
        if recomputed == "stage" and torch.is_grad_enabled():
            x = recompute(run_stage, stage, x, columns, False, random=has_dropout(stage))
        else:
            x = run_stage(stage, x, columns, recomputed == "block" and torch.is_grad_enabled())
        maps.append(x)
    return maps


def _run_blocks(stage: Any, x: Tensor, scale: Tensor | None, recomputed: bool, *others: Any) -> Tensor:
    for index, block in enumerate(stage.blocks):
        columns = None if scale is None else scale[:, 2 * index : 2 * index + 2]
        if recomputed:
            x = recompute(run_block, block, x, columns, *others, random=has_dropout(block))
        else:
            x = run_block(block, x, columns, *others)
    return x


def _swin_stage(stage: Any, x: Tensor, scale: Tensor | None, recomputed: bool) -> Tensor:
    return _run_blocks(stage, stage.downsample(x), scale, recomputed)


def _pvt_stage(stage: Any, x: Tensor, scale: Tensor | None, recomputed: bool) -> Tensor:
    if stage.downsample is not None:
        x = stage.downsample(x.permute(0, 3, 1, 2))
    height, width = x.shape[1:3]
    tokens = _run_blocks(stage, x.flatten(1, 2), scale, recomputed, (height, width))
    out: Tensor = stage.norm(tokens).unflatten(1, (height, width))
    return out
