"""Variants by name, for us (``create``) and for timm (``timm.create_model`` after ``import dattrain.models``)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from difflib import get_close_matches
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_notrace_module
from timm.models._features import FeatureGetterNet
from torch import nn

from dattrain.errors import UserError
from dattrain.models import surgery
from dattrain.models.arguments import Size
from dattrain.models.blocks import PatchEmbed, Stage
from dattrain.models.dat import DAT
from dattrain.models.datpp import ConvStem
from dattrain.models.init import Init

DATPP: dict[str, Any] = {
    "blocks": ("ND", "ND" * 2, "ND" * 9, "DD"),
    "strides": (8, 4, 2, 1),
    "stem": "conv",
    "mlp": "conv",
    "local_perception": True,
    "offset_range": "clamp",
    "reference": "shifted",
    "query_grid": "corner",
}
"""What the DAT++ variants share (arXiv 2309.01430 and the authors' configurations)."""

VARIANTS: dict[str, dict[str, Any]] = {
    "dat_tiny": {
        "dims": (96, 192, 384, 768),
        "blocks": ("LS", "LS", "LD" * 3, "LD"),
        "heads": (3, 6, 12, 24),
        "groups": (1, 2, 3, 6),
    },
    "dat_small": {
        "dims": (96, 192, 384, 768),
        "blocks": ("LS", "LS", "LD" * 9, "LD"),
        "heads": (3, 6, 12, 24),
        "groups": (1, 2, 3, 6),
    },
    "dat_base": {
        "dims": (128, 256, 512, 1024),
        "blocks": ("LS", "LS", "LD" * 9, "LD"),
        "heads": (4, 8, 16, 32),
        "groups": (1, 2, 4, 8),
    },
    # Ours, not the paper's: small enough to train on a CPU in minutes, at 64 x 64 with windows of 4.
    "dat_atto": {
        "img_size": 64,
        "dims": (32, 64, 128, 256),
        "blocks": ("L", "S", "LD", "D"),
        "heads": (2, 4, 8, 16),
        "groups": (1, 1, 2, 4),
        "window_divisor": 16,
    },
    "dat_pp_tiny": {**DATPP, "dims": (64, 128, 256, 512), "heads": (2, 4, 8, 16), "groups": (1, 2, 4, 8)},
    "dat_pp_small": {**DATPP, "dims": (96, 192, 384, 768), "heads": (3, 6, 12, 24), "groups": (1, 2, 3, 6)},
    "dat_pp_base": {**DATPP, "dims": (128, 256, 512, 1024), "heads": (4, 8, 16, 32), "groups": (2, 4, 8, 16)},
    # Ours: the authors announced an L++ for ImageNet-22K and published neither configuration nor weights. Widths and
    # heads are Swin-L's; groups keep the 64 channels that a group has in their T and B.
    "dat_pp_large": {
        **DATPP,
        "dims": (192, 384, 768, 1536),
        "heads": (6, 12, 24, 48),
        "groups": (3, 6, 12, 24),
    },
}
"""Arguments of ``DAT`` for each variant."""


def create(
    name: str,
    *,
    num_classes: int,
    img_size: Size,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    init: Init = "paper",
    **overrides: Any,
) -> DAT:
    """Build a variant with fresh weights from torch's generator.

    Args:
        name: a key of ``VARIANTS``.
        img_size: side or (height, width) that windows and bias tables are laid out for.
        overrides: other arguments of ``DAT``: the ablations.

    Raises:
        UserError: unknown variant or argument (with the nearest known one), or settings that do not fit together.
    """
    if name not in VARIANTS:
        raise UserError(
            f"model {name!r} is not known{_nearest(name, list(VARIANTS))}; there are {', '.join(VARIANTS)}"
        )
    known = [each for each in inspect.signature(DAT.__init__).parameters if each != "self"]
    for each in overrides:
        if each not in known:
            raise UserError(f"model.overrides.{each} is not an argument of {name}{_nearest(each, known)}")
    given = {
        "num_classes": num_classes,
        "img_size": img_size,
        "in_chans": in_chans,
        "drop_path_rate": drop_path_rate,
    }
    return DAT(**{**VARIANTS[name], **given, "init": init, **overrides})


def variant_of(model: DAT) -> str | None:
    """Name of the variant whose architecture and conventions this is, whatever its image size, windows and head."""

    def outline(of: DAT) -> tuple[object, ...]:
        shapes = {
            name: tuple(parameter.shape)
            for name, parameter in of.named_parameters()
            if "bias_table" not in name and not name.startswith("head.")
        }
        strides = [stride for stride, kinds in zip(of.strides, of.blocks) if "D" in kinds]
        return of.blocks, of.heads, strides, of.shift, of.conventions, shapes

    wanted = outline(model)
    for name, arguments in VARIANTS.items():
        if arguments["dims"] == model.dims and arguments["blocks"] == model.blocks:
            with torch.device("meta"):
                if outline(DAT(**{**arguments, "in_chans": model.in_chans})) == wanted:
                    return name
    return None


def _nearest(name: str, known: list[str]) -> str:
    match = get_close_matches(name, known, 1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _config(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "crop_mode": "squash",
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "license": "apache-2.0",
        **kwargs,
    }


# Their padding follows the size of the map: timm's torch.fx extractors keep them whole.
for _part in (PatchEmbed, ConvStem, Stage):
    register_notrace_module(_part)

default_cfgs = generate_default_cfgs(
    {
        "dat_tiny.untrained": _config(),
        "dat_small.untrained": _config(),
        "dat_base.untrained": _config(),
        "dat_atto.untrained": _config(input_size=(3, 64, 64), pool_size=(2, 2)),
        "dat_pp_tiny.untrained": _config(first_conv="patch_embed.conv1"),
        "dat_pp_small.untrained": _config(first_conv="patch_embed.conv1"),
        "dat_pp_base.untrained": _config(first_conv="patch_embed.conv1"),
        "dat_pp_large.untrained": _config(first_conv="patch_embed.conv1", num_classes=21841),
    }
)


class Features(FeatureGetterNet):
    """timm's wrapper for ``features_only=True``, with drop path as a function of the sample."""

    def forward(self, x: torch.Tensor, drop_path_noise: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Maps of the stages asked for, B x C x H x W; ``drop_path_noise`` as in ``DAT.forward``."""
        maps: list[torch.Tensor] = self.model.forward_intermediates(  # type: ignore[operator]
            x,
            indices=self.out_indices,
            norm=self.norm,
            output_fmt=self.output_fmt,
            intermediates_only=True,
            drop_path_noise=drop_path_noise,
        )
        return maps


def _build(
    name: str,
    pretrained: bool,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a variant for timm; ``device`` and ``dtype`` are those of ``timm.create_model``."""
    arguments = VARIANTS[name]
    out_indices = kwargs.pop("out_indices", tuple(range(len(arguments["dims"]))))
    given = kwargs.get("pretrained_cfg")
    given = {**(given if isinstance(given, dict) else {}), **(kwargs.get("pretrained_cfg_overlay") or {})}
    if given.get("input_size") is not None:  # what the images will be, so what the tables are laid out for
        kwargs.setdefault("img_size", tuple(given["input_size"][-2:]))
    if kwargs.pop("dynamic_img_size", False):  # timm's word for it
        kwargs["strict_img_size"] = False
    with nullcontext() if device is None else torch.device(device):
        model = build_model_with_cfg(
            DAT,
            name,
            pretrained,
            pretrained_filter_fn=surgery.checkpoint_filter_fn,
            feature_cfg={"out_indices": out_indices, "feature_cls": Features, "flatten_sequential": True},
            **{**arguments, **kwargs},
        )
    return model if dtype is None else model.to(dtype=dtype)


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    """What ``timm.create_model(name)`` calls: timm knows it by its name and module."""

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _build(name, pretrained, **kwargs)

    build.__name__ = name
    return build


for _name in VARIANTS:
    register_model(_entrypoint(_name))

# ``register_model`` adds entry points, which this module does not have by name.
__all__ = ["VARIANTS", "create", "variant_of"]
