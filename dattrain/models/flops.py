"""Parameters and FLOPs in the paper's convention, which is fvcore's.

Multiply-accumulates of convolutions, linear layers and attention, 5 per number that a LayerNorm or GroupNorm writes, 1 per
number of a BatchNorm, 4 per number that bilinear sampling writes. Attention and sampling are counted from their sizes
(``core_flops``), so the count does not depend on which backend runs or on what a kernel fuses away. Pooling and resizing of
maps count nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from timm.models import pvt_v2, swin_transformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

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
        def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            counted = count_call(module, inputs, output)
            if counted:
                counts[name] = counts.get(name, 0) + counted

        return count

    for name, module in meta_model.named_modules():
        module.register_forward_hook(hook(name))
    # What a detector does after its heads is no arithmetic that anybody counts, and depends on what is in the image.
    run = getattr(meta_model, "forward_dummy", meta_model)
    with torch.no_grad():
        run(torch.empty(1, in_chans, height, width, device="meta"))
    return counts


def count_call(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> int:
    """Multiply-accumulates (and what stands for norms and sampling) of one call of ``module`` itself, over the batch.

    From its settings, since ZeRO-3 may have partitioned its weights.
    """
    written: int = output.numel() if isinstance(output, Tensor) else 0
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
        return 5 * written
    if isinstance(module, _BatchNorm):
        return written
    if isinstance(module, nn.Linear):
        return written * module.in_features
    if isinstance(module, nn.ConvTranspose2d):
        # Every input channel goes into this many outputs.
        read: int = inputs[0].numel()
        height, width = module.kernel_size
        return read * module.out_channels // module.groups * height * width
    if isinstance(module, (nn.Conv2d, MapConv)):
        # Every output channel is a sum over this many inputs, wherever the channels lie in memory.
        height, width = module.kernel_size
        return written * module.in_channels // module.groups * height * width
    if isinstance(module, swin_transformer.WindowAttention):
        # B * windows x tokens x channels; what is written has as many numbers.
        tokens: int = inputs[0].shape[1]
        return 2 * tokens * written
    if isinstance(module, pvt_v2.Attention):
        return 2 * written * _pvt_keys(module, *inputs[1])
    if not hasattr(module, "core_flops"):
        return 0
    core: Callable[[int, int], int] = module.core_flops  # type: ignore[assignment]
    batch: int = inputs[0].shape[0]
    return batch * core(*inputs[0].shape[1:3])


def _pvt_keys(module: Any, height: int, width: int) -> int:
    if module.pool is not None:  # PVT v2 Li
        return int(module.pool.output_size) ** 2
    rows, columns = (1, 1) if module.sr is None else module.sr.stride
    return (height // rows) * (width // columns)
