"""Write our checkpoints as DeepSpeed's universal ones, for people who go to it."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path
from typing import Any

import torch

from dattrain.errors import UserError
from dattrain.state import gather
from dattrain.state.format import checkpoint
from dattrain.state.format.manifest import Manifest

_STATES: tuple[tuple[str, gather.State], ...] = (
    ("fp32", "param"),
    ("exp_avg", "exp_avg"),
    ("exp_avg_sq", "exp_avg_sq"),
)
"""DeepSpeed's name of a state, and ours."""


def write_universal(folder: Path, out: Path) -> Path:
    """Write our checkpoint as DeepSpeed's universal one; returns the tag's folder ``out/global_step<N>_universal``.

    DeepSpeed loads it under ``"checkpoint": {"load_universal": true}`` into ZeRO 1-3 of any world size. One tensor is in
    memory at a time. Averages have no place in that layout and stay behind.

    Raises:
        UserError: ``out`` already holds it, or the checkpoint is damaged.
    """
    import deepspeed

    folder = checkpoint.locate(folder)
    manifest = checkpoint.check(folder)
    tag = f"global_step{manifest.step}_universal"
    final = out / tag
    if final.exists():
        raise UserError(f"{final} is there already")
    for name in manifest.parameters:
        if "/" in name or "\0" in name or name in ("", ".", ".."):
            raise UserError(f"{folder} names a parameter {name!r}, which cannot be the name of a folder")
    out.mkdir(parents=True, exist_ok=True)
    tmp_path = out / f".{tag}.{secrets.token_hex(4)}"
    try:
        for key, state in _STATES:
            for name, tensor in gather.iter_tensors(folder, state):
                if manifest.parameters[name].trainable:
                    place = tmp_path / "zero" / name
                    place.mkdir(parents=True, exist_ok=True)
                    torch.save({"param": tensor, "cat_dim": 0}, place / f"{key}.pt")
        for name, parameter in manifest.parameters.items():
            if parameter.trainable:
                torch.save(torch.tensor(float(parameter.opt_step or 0)), tmp_path / "zero" / name / "step.pt")
        torch.save(_global_state(manifest, deepspeed.__version__), tmp_path / "zero" / "optimizer_state.pt")
        model_states = _model_states(folder, manifest, deepspeed.__version__)
        # Stages 1, 2 look for the first name, stage 3 for the second.
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
            torch.save(model_states, tmp_path / name)
        tmp_path.rename(final)
        (out / "latest_universal").write_text(tag)
    except BaseException:
        shutil.rmtree(tmp_path, ignore_errors=True)
        raise
    return final


def _global_state(manifest: Manifest, version: str) -> dict[str, Any]:
    groups = []
    for group in manifest.groups:
        groups.append({k: tuple(v) if k == "betas" else v for k, v in group.items()} | {"params": []})
    trained = [p.opt_step or 0 for p in manifest.parameters.values() if p.trainable]
    return {
        "ds_version": version,
        "param_groups": groups,
        # Stage 3 gives every group the values of the first one that it finds here; without any, each keeps its own.
        "optimizer_state_dict": {
            "state": {0: {"step": torch.tensor(float(max(trained, default=0)))}},
            "param_groups": [{"params": []}],
        },
    }


def _model_states(folder: Path, manifest: Manifest, version: str) -> dict[str, Any]:
    frozen = {n: p.shape for n, p in manifest.parameters.items() if not p.trainable}
    buffers = gather.load_buffers(folder)
    # A universal load takes weights from zero/; frozen parameters and buffers are here for whoever reads the file.
    module = dict(gather.iter_tensors(folder, "param", names=frozen)) | buffers
    return {
        "module": module,
        "buffer_names": list(buffers),
        "optimizer": None,
        "param_shapes": [{n: torch.Size(p.shape) for n, p in manifest.parameters.items() if p.trainable}],
        "frozen_param_shapes": {n: torch.Size(s) for n, s in frozen.items()} or None,
        "shared_params": {},
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": int(manifest.engine.get("skipped_steps", 0)),
        "global_steps": int(manifest.engine.get("global_steps", manifest.step)),
        "global_samples": int(manifest.engine.get("global_samples", manifest.samples_seen)),
        "dp_world_size": manifest.world,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": version,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
    }
