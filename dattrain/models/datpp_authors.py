"""DAT++ in the authors' names: importing this registers its modules with ``authors.links``.

Also which DAT++ a checkpoint of theirs holds, from their configuration or from names and shapes, as ``recognise`` does for
the CVPR code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from dattrain.errors import UserError
from dattrain.models.authors import Link, links, only, pointwise, same
from dattrain.models.datpp import ConvDownsample, ConvMlp, ConvStem, LocalPerception, NeighborhoodAttention
from dattrain.models.recognise import classes, offset_range

CONVENTIONS: dict[str, Any] = {"reference": "shifted", "query_grid": "corner"}
"""What the DAT++ code has fixed."""


@links.register
def _stem(module: ConvStem, theirs: str, ours: str) -> Iterator[Link]:
    yield from same(f"{theirs}.0", f"{ours}.conv1")
    yield from same(f"{theirs}.1.norm", f"{ours}.norm1")
    yield from same(f"{theirs}.3", f"{ours}.conv2")
    yield from same(f"{theirs}.4.norm", f"{ours}.norm2")


@links.register
def _downsample(module: ConvDownsample, theirs: str, ours: str) -> Iterator[Link]:
    yield only(f"{theirs}.0.weight", f"{ours}.conv.weight")
    yield from same(f"{theirs}.1.norm", f"{ours}.norm")


@links.register
def _local(module: LocalPerception, theirs: str, ours: str) -> Iterator[Link]:
    yield from same(theirs, ours)


@links.register
def _mlp(module: ConvMlp, theirs: str, ours: str) -> Iterator[Link]:
    yield from pointwise(f"{theirs}.linear1.0", f"{ours}.fc1")
    yield from pointwise(f"{theirs}.linear2.0", f"{ours}.fc2")
    yield from same(f"{theirs}.dwc", f"{ours}.dwconv")


@links.register
def _attention(module: NeighborhoodAttention, theirs: str, ours: str) -> Iterator[Link]:
    yield only(f"{theirs}.rpb", f"{ours}.bias_table")
    yield from same(f"{theirs}.qkv", f"{ours}.qkv")
    yield from same(f"{theirs}.proj", f"{ours}.proj")


def from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``DAT`` for the authors' MODEL.DAT mapping of the DAT++ code.

    Raises:
        UserError: a setting that this package does not build, by name.
    """
    blocks = tuple("".join(kinds) for kinds in config["stage_spec"])
    stages = len(blocks)
    if [len(kinds) for kinds in blocks] != list(config["depths"]):
        raise UserError(f"stage_spec={config['stage_spec']} does not have depths={config['depths']} blocks")
    for name, supported in (("log_cpb", False), ("attn_drop_rate", 0.0), ("dim_stem", config["dims"][0])):
        values = _each(config.get(name, supported), stages)
        if set(values) != {supported}:
            raise UserError(
                f"{name}={config[name]} of the authors' DAT++ code is not built here; only {supported}"
            )
    if max(_each(config.get("layer_scale_values", -1), stages)) > 0:
        raise UserError("layer_scale_values of the authors' DAT++ code are not built here; only -1 (off)")
    deformable = [stage for stage, kinds in enumerate(blocks) if "D" in kinds]

    def common(name: str, default: Any, among: Sequence[int] = range(stages)) -> Any:
        every = _each(config.get(name, default), stages)
        values = [every[stage] for stage in among] or [default]
        if len(set(values)) > 1:
            raise UserError(f"{name}={config[name]} differs between stages; one value is needed")
        return values[0]

    position = "relative"
    if not common("use_pes", False, deformable):
        position = "none"
    elif common("dwc_pes", False, deformable):
        position = "dwconv"
    elif common("fixed_pes", False, deformable):
        position = "fixed"
    conv_stem = bool(config.get("use_conv_patches", False))
    return {
        "img_size": config["img_size"],
        "patch_size": config.get("patch_size", 4),
        "num_classes": config.get("num_classes", 1000),
        "mlp_ratio": config.get("expansion", 4),
        "dims": tuple(config["dims"]),
        "blocks": blocks,
        "heads": tuple(config["heads"]),
        "groups": tuple(max(each, 1) for each in config["groups"]),
        "strides": tuple(max(each, 1) for each in config["strides"]),
        "offset_kernels": tuple(config.get("ksizes", (9, 7, 5, 3))),
        "neighborhood": tuple(config.get("nat_ksizes", (3,) * stages)),
        "sr_ratios": tuple(max(each, 1) for each in config.get("sr_ratios", (8, 4, 2, 1))),
        "window_size": tuple((side, side) for side in config.get("window_sizes", (7,) * stages)),
        "stem": "conv" if conv_stem else "patch",
        "mlp": "conv" if common("use_dwc_mlps", False) else "linear",
        "local_perception": bool(common("use_lpus", False)),
        "offsets": not common("no_offs", False, deformable),
        "offset_range": offset_range(common("offset_range_factor", -1, deformable), negative="clamp"),
        "position": position,
        "proj_drop_rate": config.get("drop_rate", 0.0),
        "drop_path_rate": config.get("drop_path_rate", 0.0),
        **CONVENTIONS,
    }


def from_tensors(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of ``DAT`` for the tensors of a DAT++ checkpoint.

    What tensors cannot tell is taken from the released models: strides 8, 4, 2, 1 and offsets clamped to the map.

    Raises:
        UserError: these are not tensors of such a model.
    """
    try:
        return _from_tensors(state)
    except (KeyError, IndexError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"not a checkpoint of the authors' DAT++ ({type(error).__name__}: {error}); "
            f"its {len(state)} tensors begin with {', '.join(list(state)[:3])}"
        ) from error


def _from_tensors(state: Mapping[str, Tensor]) -> dict[str, Any]:
    stages = 1 + max(int(hit[1]) for name in state if (hit := re.match(r"stages\.(\d+)\.", name)))
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
        "in_chans": state["patch_proj.0.weight"].shape[1],
        "num_classes": classes(state),
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
    prefix = f"stages.{stage}.attns."
    depth = 1 + max(int(name[len(prefix) :].split(".")[0]) for name in state if name.startswith(prefix))
    dim = state[f"stages.{stage}.layer_norms.0.norm.weight"].shape[0]
    out: dict[str, Any] = {
        "dims": dim,
        "blocks": "",
        "groups": 1,
        "offset_kernels": 3,
        "neighborhood": 7,
        "table": 0,
    }
    for name in (f"{prefix}{index}" for index in range(depth)):
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


def _each(value: Any, stages: int) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * stages
