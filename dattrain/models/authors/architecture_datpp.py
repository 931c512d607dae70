"""Which DAT++ a checkpoint of the authors holds, as ``architecture`` does for the CVPR code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dattrain.errors import UserError
from dattrain.models.authors import architecture

CONVENTIONS: dict[str, Any] = {"reference": "shifted", "query_grid": "corner"}
"""What the DAT++ code has fixed."""


def from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``DAT`` for the authors' MODEL.DAT mapping of the DAT++ code.

    Raises:
        UserError: a setting that this package does not build, by name.
    """
    blocks = architecture.blocks_of(config)
    stages = len(blocks)
    for name, supported in (("log_cpb", False), ("attn_drop_rate", 0.0), ("dim_stem", config["dims"][0])):
        values = architecture.per_stage(config.get(name, supported), stages)
        if set(values) != {supported}:
            raise UserError(
                f"{name}={config[name]} of the authors' DAT++ code is not built here; only {supported}"
            )
    if max(architecture.per_stage(config.get("layer_scale_values", -1), stages)) > 0:
        raise UserError("layer_scale_values of the authors' DAT++ code are not built here; only -1 (off)")
    deformable = [stage for stage, kinds in enumerate(blocks) if "D" in kinds]

    def common(name: str, default: Any) -> Any:
        return architecture.one_value(config, name, default, deformable)

    conv_stem = bool(config.get("use_conv_patches", False))
    return {
        **architecture.shared_arguments(config, blocks),
        "offset_kernels": tuple(config.get("ksizes", (9, 7, 5, 3))),
        "neighborhood": tuple(config.get("nat_ksizes", (3,) * stages)),
        "sr_ratios": architecture.at_least_one(config.get("sr_ratios", (8, 4, 2, 1))),
        "window_size": tuple((side, side) for side in config.get("window_sizes", (7,) * stages)),
        "stem": "conv" if conv_stem else "patch",
        "mlp": "conv" if architecture.one_value(config, "use_dwc_mlps", False, range(stages)) else "linear",
        "local_perception": bool(architecture.one_value(config, "use_lpus", False, range(stages))),
        "offsets": not common("no_offs", False),
        "offset_range": architecture.offset_range(common("offset_range_factor", -1), negative="clamp"),
        "position": architecture.position(config, deformable, default=False),
        **CONVENTIONS,
    }


def from_tensors(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of ``DAT`` for the tensors of a DAT++ checkpoint.

    What tensors cannot tell is taken from the released models: strides 8, 4, 2, 1 and offsets clamped to the map.

    Raises:
        UserError: these are not tensors of such a model.
    """
    stages = architecture.count_stages(state)
    conv_stem = "patch_proj.3.weight" in state
    patch = 4 if conv_stem else state["patch_proj.0.weight"].shape[-1]
    conv_mlp = "stages.0.mlps.0.dwc.weight" in state
    first = "linear1.0" if conv_mlp else "chunk.linear1"
    found = [_stage(state, stage) for stage in range(stages)]
    sides = {
        ((each["table"] + 1) // 2) * patch * 2**stage for stage, each in enumerate(found) if each["table"]
    }
    if len(sides) != 1:
        raise UserError(
            f"its position tables are of image sizes {sorted(sides)}: give the authors' configuration"
        )
    return {
        "img_size": sides.pop(),
        "patch_size": patch,
        "mlp_ratio": state[f"stages.0.mlps.0.{first}.weight"].shape[0] / found[0]["dims"],
        **{
            name: tuple(each[name] for each in found)
            for name in ("dims", "blocks", "heads", "groups", "offset_kernels", "neighborhood")
        },
        "strides": (8, 4, 2, 1)[:stages],
        "stem": "conv" if conv_stem else "patch",
        "mlp": "conv" if conv_mlp else "linear",
        "local_perception": "stages.0.local_perception_units.0.weight" in state,
        "offset_range": "clamp",
        "position": "relative",
        **CONVENTIONS,
    }


def _stage(state: Mapping[str, Tensor], stage: int) -> dict[str, Any]:
    dim, attentions = architecture.stage_attentions(state, stage)
    out: dict[str, Any] = {
        "dims": dim,
        "blocks": "",
        "groups": 1,
        "offset_kernels": 3,
        "neighborhood": 7,
        "table": 0,
    }
    for name in attentions:
        if f"{name}.rpb" in state:
            out["blocks"] += "N"
            out["heads"], rows, _ = state[f"{name}.rpb"].shape
            out["neighborhood"] = (rows + 1) // 2
        else:
            out["blocks"] += "D"
            channels, _, out["offset_kernels"], _ = state[f"{name}.conv_offset.0.weight"].shape
            out["groups"] = dim // channels
            out["heads"], out["table"], columns = state[f"{name}.rpe_table"].shape
            if columns != out["table"] or columns % 2 == 0:
                raise UserError(
                    f"{name}.rpe_table is {out['table']} x {columns}: give the authors' configuration"
                )
    return out
