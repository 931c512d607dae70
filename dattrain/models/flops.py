"""Parameters and FLOPs in the paper's convention, which is fvcore's.

Multiply-accumulates of convolutions, linear layers and attention, 5 per number that a LayerNorm writes, 4 per number that
bilinear sampling writes. Attention and sampling are counted from their sizes (``core_flops``), so the count does not depend
on which backend runs or on what a kernel fuses away.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from dattrain.models.blocks import MapConv


def parameters(model: nn.Module) -> int:
    """Number of parameters, buffers left out (the paper's figures leave them out too)."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops(model: nn.Module, img_size: int | tuple[int, int], in_chans: int = 3) -> int:
    """FLOPs of one image, counted on the meta device: nothing is computed and ``model`` is left alone.

    Args:
        img_size: side or (height, width), in pixels.
    """
    return sum(by_module(model, img_size, in_chans).values())


def by_module(model: nn.Module, img_size: int | tuple[int, int], in_chans: int = 3) -> dict[str, int]:
    """FLOPs of one image by module name; an attention's own entry is its core, without its projections."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    meta_model = deepcopy(model).to("meta").eval()
    counts: dict[str, int] = {}

    def hook(name: str) -> Any:
        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            counts[name] = counts.get(name, 0) + count_call(module, inputs[0], output)

        return count

    for name, module in meta_model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, MapConv, nn.LayerNorm)) or hasattr(module, "core_flops"):
            module.register_forward_hook(hook(name))
    with torch.no_grad():
        meta_model(torch.empty(1, in_chans, height, width, device="meta"))
    return counts


def count_call(module: nn.Module, x: Tensor, output: Tensor) -> int:
    """Multiply-accumulates (5 per number of a LayerNorm, 4 per sampled one) of one call of ``module`` itself, over the batch.

    From its settings, since ZeRO-3 may have partitioned its weights.
    """
    if isinstance(module, nn.LayerNorm):
        return 5 * output.numel()
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    if isinstance(module, (nn.Conv2d, MapConv)):
        # Every output channel is a sum over this many inputs, wherever the channels lie in memory.
        height, width = module.kernel_size
        return output.numel() * module.in_channels // module.groups * height * width
    core = getattr(module, "core_flops", None)
    return 0 if core is None else x.shape[0] * core(*x.shape[1:3])
