"""Which DAT a checkpoint of the authors' CVPR code holds: from their configuration, or from its tensors' names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import isqrt
from typing import Any

from torch import Tensor

from dattrain.errors import UserError
from dattrain.models.deformable import OffsetRange


def is_datpp(state: Mapping[str, Tensor]) -> bool:
    """Whether these are tensors of DAT++: it alone has neighbourhood attention or local perception units."""
    return any(name.endswith(".rpb") or ".local_perception_units." in name for name in state)


def classes(state: Mapping[str, Tensor]) -> int:
    """Outputs of the classification head; 0 where there is none."""
    head = state.get("cls_head.weight")
    return 0 if head is None else head.shape[0]


def count_stages(state: Mapping[str, Tensor]) -> int:
    """How many stages there are."""
    return 1 + max(int(found[1]) for name in state if (found := re.match(r"stages\.(\d+)\.", name)))


def stage_attentions(state: Mapping[str, Tensor], stage: int) -> tuple[int, list[str]]:
    """Channels of a stage, and the names of its attentions."""
    prefix = f"stages.{stage}.attns."
    depth = 1 + max(int(name[len(prefix) :].split(".")[0]) for name in state if name.startswith(prefix))
    dim = state[f"stages.{stage}.layer_norms.0.norm.weight"].shape[0]
    return dim, [f"{prefix}{index}" for index in range(depth)]


def from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``DAT`` for the authors' MODEL.DAT mapping of the CVPR code.

    Raises:
        UserError: a setting that this package does not build, by name.
    """
    blocks = blocks_of(config)
    _refuse(config, dim_stem=config["dims"][0], use_conv_patches=False, attn_drop_rate=0.0)
    _refuse(config, use_dwc_mlps=[False] * len(blocks))
    deformable = [stage for stage, kinds in enumerate(blocks) if "D" in kinds]

    def common(name: str, default: Any) -> Any:
        return one_value(config, name, default, deformable)

    return {
        **shared_arguments(config, blocks),
        "sr_ratios": at_least_one(config.get("sr_ratios", (-1,) * len(blocks))),
        "window_size": tuple((side, side) for side in config["window_sizes"]),
        "offsets": not common("no_offs", False),
        "offset_range": offset_range(common("offset_range_factor", 2), negative="tanh"),
        "position": position(config, deformable, default=True),
    }


def blocks_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Letters of the blocks of each stage.

    Raises:
        UserError: they are not as many as the depths.
    """
    blocks = tuple("".join(kinds) for kinds in config["stage_spec"])
    if [len(kinds) for kinds in blocks] != list(config["depths"]):
        raise UserError(f"stage_spec={config['stage_spec']} does not have depths={config['depths']} blocks")
    return blocks


def shared_arguments(config: Mapping[str, Any], blocks: tuple[str, ...]) -> dict[str, Any]:
    """Arguments that both of their codes state alike; channels of an image and classes are told by the tensors."""
    return {
        "img_size": config["img_size"],
        "patch_size": config.get("patch_size", 4),
        "mlp_ratio": config.get("expansion", 4),
        "dims": tuple(config["dims"]),
        "blocks": blocks,
        "heads": tuple(config["heads"]),
        "groups": at_least_one(config["groups"]),
        "strides": at_least_one(config["strides"]),
        "proj_drop_rate": config.get("drop_rate", 0.0),
        "drop_path_rate": config.get("drop_path_rate", 0.0),
    }


def at_least_one(values: Iterable[int]) -> tuple[int, ...]:
    """Their -1 of stages that have no use for a setting is our 1."""
    return tuple(max(each, 1) for each in values)


def per_stage(value: Any, stages: int) -> list[Any]:
    """A list as it is; else the value of every stage."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * stages


def one_value(config: Mapping[str, Any], name: str, default: Any, stages: Sequence[int]) -> Any:
    """What a setting is in all of ``stages``.

    Raises:
        UserError: it differs between them.
    """
    every = per_stage(config.get(name, default), len(config["depths"]))
    values = [every[stage] for stage in stages] or [default]
    if len(set(values)) > 1:
        raise UserError(f"{name}={config[name]} differs between stages; one value is needed")
    return values[0]


def position(config: Mapping[str, Any], deformable: Sequence[int], *, default: bool) -> str:
    """Kind of position bias of the deformable stages; ``default`` is whether there is one where nothing is said."""
    if not one_value(config, "use_pes", default, deformable):
        return "none"
    if one_value(config, "dwc_pes", False, deformable):
        return "dwconv"
    return "fixed" if one_value(config, "fixed_pes", False, deformable) else "relative"


def offset_range(factor: float, negative: OffsetRange) -> OffsetRange:
    """Their ``offset_range_factor``: a limit above 0, ``free`` at 0, below it ``tanh`` (CVPR) or ``clamp`` (DAT++)."""
    if factor < 0:
        return negative
    return float(factor) or "free"


def from_tensors(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of ``DAT`` for the tensors of a CVPR checkpoint.

    What tensors cannot tell is taken from the released models: strides 4, 2, 1, 1 and offsets within 2 / map size.

    Raises:
        UserError: these are not tensors of such a model.
    """
    patch = state["patch_proj.0.weight"]
    count = count_stages(state)
    blocks, heads, groups, windows, kernels, dims = [], [], [], [], [], []
    kind, side = "none", 0
    for stage in range(count):
        dim, attentions = stage_attentions(state, stage)
        blocks.append("".join(_kind(state, name) for name in attentions))
        dims.append(dim)
        stage_heads, stage_groups, window, kernel = 0, 1, 1, (9, 7, 5, 3)[min(stage, 3)]
        for name in attentions:
            if f"{name}.relative_position_bias_table" in state:
                rows, stage_heads = state[f"{name}.relative_position_bias_table"].shape
                window = (isqrt(rows) + 1) // 2
                if f"{name}.attn_mask" in state:
                    across = isqrt(state[f"{name}.attn_mask"].shape[0])
                    side = side or across * window * patch.shape[-1] * 2**stage
            if f"{name}.conv_offset.0.weight" in state:
                channels, _, kernel, _ = state[f"{name}.conv_offset.0.weight"].shape
                stage_groups = dim // channels
            if f"{name}.rpe_table" in state:
                kind = "relative"
                stage_heads, rows, columns = state[f"{name}.rpe_table"].shape
                if rows != columns or rows % 2 == 0:
                    raise UserError(
                        f"{name}.rpe_table of {rows} x {columns} needs the authors' configuration to be read"
                    )
                side = (rows + 1) // 2 * patch.shape[-1] * 2**stage
            elif f"{name}.rpe_table.weight" in state:
                kind = "dwconv"
        if not stage_heads or not side:
            raise UserError(
                f"stage {stage} has no bias table that tells its heads or size: give the authors' configuration"
            )
        heads.append(stage_heads)
        groups.append(stage_groups)
        windows.append(window)
        kernels.append(kernel)
    hidden = state["stages.0.mlps.0.chunk.linear1.weight"].shape[0]
    return {
        "img_size": side,
        "patch_size": patch.shape[-1],
        "mlp_ratio": hidden / dims[0],
        "dims": tuple(dims),
        "blocks": tuple(blocks),
        "heads": tuple(heads),
        "groups": tuple(groups),
        "strides": (4, 2, 1, 1)[:count],
        "offset_kernels": tuple(kernels),
        "window_size": tuple((side, side) for side in windows),
        "position": kind,
    }


def _kind(state: Mapping[str, Tensor], name: str) -> str:
    if f"{name}.conv_offset.0.weight" in state:
        return "D"
    if f"{name}.proj_qkv.weight" in state:
        return "S" if f"{name}.attn_mask" in state else "L"
    raise KeyError(f"{name}.proj_qkv.weight")


def _refuse(config: Mapping[str, Any], **supported: Any) -> None:
    for name, value in supported.items():
        given = config.get(name, value)
        if (list(given) if isinstance(given, Sequence) else given) != value:
            raise UserError(f"{name}={given} of the authors' CVPR code is not built here; only {value}")
