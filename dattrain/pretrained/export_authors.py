"""A model under the authors' names: what their code's ``--resume``, ``--pretrained`` and ``--cfg`` take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from dattrain.errors import UserError
from dattrain.models.authors.convert import from_authors, to_authors
from dattrain.models.dat import DAT
from dattrain.pretrained import import_authors
from dattrain.pretrained.exported import EXACT, Exported
from dattrain.pretrained.pretrained_cfg import PretrainedCfg


def write_authors(model: DAT, cfg: PretrainedCfg, out: Path) -> Exported:
    """``{"model": state}`` as their ``--resume`` and ``--pretrained`` take it, and a YAML beside it for their ``--cfg``."""
    config = authors_config(model)
    torch.save({"model": to_authors(model)}, out)
    name = out.with_suffix(".yaml")
    name.write_text(
        yaml.safe_dump({"MODEL": {"TYPE": "dat", "NAME": cfg.name, "DAT": config}}, sort_keys=False),
        encoding="utf-8",
    )
    state, *_ = import_authors.load(out)
    return Exported(out, cfg, from_authors(state, import_authors.read_config(name)), EXACT)


def authors_config(model: DAT) -> dict[str, Any]:
    """Their MODEL.DAT mapping for this model.

    Raises:
        UserError: a setting that their code does not have.
    """
    height, width = model.img_size
    conventions, stages = model.conventions, len(model.blocks)
    plus = any("N" in kinds for kinds in model.blocks) or model.local_perception
    wanted = ("shifted", "corner") if plus else ("center", "center")
    if height != width or (conventions.reference, conventions.query_grid) != wanted:
        raise UserError(
            f"the authors' {'DAT++' if plus else 'CVPR'} code has square images and reference={wanted[0]}, query_grid={wanted[1]}; "
            f"this model has {height} x {width}, {conventions.reference}, {conventions.query_grid}"
        )
    windows = model.windows(model.img_size)
    if oblong := [w for w, kinds in zip(windows, model.blocks) if set(kinds) & set("LS") and w[0] != w[1]]:
        raise UserError(
            f"the authors' code has square windows; this model's are {oblong[0][0]} x {oblong[0][1]}"
        )
    limit = conventions.offset_range
    deformable = ["D" in kinds for kinds in model.blocks]
    if any(deformable) and limit == ("tanh" if plus else "clamp"):  # their factor of -1 is the other one
        raise UserError(
            f"the authors' {'DAT++' if plus else 'CVPR'} code has no offset_range={limit}, which this model has"
        )
    settings: dict[str, Any] = {
        "img_size": height,
        "patch_size": model.patch_size,
        "num_classes": model.num_classes,
        "expansion": int(model.mlp_ratio),
        "dim_stem": model.dims[0],
        "dims": list(model.dims),
        "depths": list(model.depths),
        "stage_spec": [list(kinds) for kinds in model.blocks],
        "heads": list(model.heads),
        "window_sizes": [window[0] for window in windows],
        "groups": [each if used else -1 for each, used in zip(model.groups, deformable)],
        "strides": [each if used else -1 for each, used in zip(model.strides, deformable)],
        "sr_ratios": [each if "P" in kinds else -1 for each, kinds in zip(model.sr_ratios, model.blocks)],
        "offset_range_factor": [
            (-1 if not used or limit in ("tanh", "clamp") else 0 if limit == "free" else limit)
            for used in deformable
        ],
        "use_pes": [used and conventions.position != "none" for used in deformable],
        "dwc_pes": [used and conventions.position == "dwconv" for used in deformable],
        "fixed_pes": [used and conventions.position == "fixed" for used in deformable],
        "no_offs": [used and not conventions.offsets for used in deformable],
        "use_dwc_mlps": [model.mlp == "conv"] * stages,
        "use_conv_patches": model.stem == "conv",
        "drop_rate": 0.0,
        "attn_drop_rate": 0.0,
        "drop_path_rate": 0.0,
    }
    if plus:
        settings |= {
            "use_lpus": [model.local_perception] * stages,
            "ksizes": list(model.offset_kernels),
            "nat_ksizes": list(model.neighborhood),
        }
    return settings
