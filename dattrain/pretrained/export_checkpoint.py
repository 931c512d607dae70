"""A run's checkpoint for other programs, gathered one tensor at a time, without building the model in memory."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

from dattrain.engine.optim import layer_scales, param_groups
from dattrain.errors import UserError
from dattrain.pretrained.export_timm import write_timm_config
from dattrain.pretrained.pretrained_cfg import PretrainedCfg
from dattrain.pretrained.recipe_model import network
from dattrain.pretrained.weights import METADATA_KEY, cfg_of_checkpoint, config_of
from dattrain.state import gather
from dattrain.state.convert import dcp_write, offline
from dattrain.state.dtypes import DTYPE_NAMES
from dattrain.state.format.manifest import Manifest


def export_dcp(folder: Path, manifest: Manifest, out: Path) -> Path:
    """Write torch.distributed.checkpoint's layout with optimizer state; returns its folder.

    Raises:
        UserError: no ``config.yaml`` around the checkpoint, or one of another model.
    """
    return dcp_write.write(folder, out, _groups(folder, manifest))


def export_safetensors(folder: Path, manifest: Manifest, out: Path, *, ema: bool) -> PretrainedCfg | None:
    """Write ``model.safetensors``, and timm's ``config.json`` beside it where a run's ``config.yaml`` names an image classifier.

    Args:
        folder: the checkpoint.
        manifest: its manifest.
        out: the folder to write.
        ema: the averaged weights instead of the trained ones.

    Returns:
        The pretrained config; None without such a ``config.yaml``.

    Raises:
        UserError: the checkpoint holds no averaged weights.
        OSError: it cannot be written.
    """
    state: gather.State = "ema" if ema else "param"
    if ema and "ema" not in manifest.states:
        raise UserError(f"{folder} holds no averaged weights; export without --ema")
    cfg = cfg_of_checkpoint(folder, manifest, ema=ema)
    buffers = gather.load_buffers(folder)
    shapes = {n: ("F32", p.shape) for n, p in manifest.parameters.items()}
    shapes.update({n: (DTYPE_NAMES[b.dtype], tuple(b.shape)) for n, b in buffers.items()})
    metadata = {"format": "pt"}
    out.mkdir(parents=True, exist_ok=True)
    if cfg is not None:
        metadata[METADATA_KEY] = cfg.to_json()
        if cfg.task == "classification":
            write_timm_config(cfg, out)
    tensors = chain(gather.iter_tensors(folder, state), buffers.items())
    offline.stream_file(out / "model.safetensors", tensors, shapes, metadata)
    return cfg


def _groups(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """The recipe's optimizer groups with names for parameters and rates as they were; one per rate under layer_decay."""
    config = config_of(folder)
    if config is None:
        raise UserError(
            f"{folder}: no config.yaml in the run folder around it says which parameters decay; "
            "put the run's config.yaml beside its checkpoints"
        )
    optim = config.optim
    net = network(config, manifest.meta.get("img_size", config.model.img_size))
    for name, parameter in net.named_parameters():
        if name not in manifest.parameters:
            raise UserError(
                f"{folder} has no {name}: it is not of the model {config.model.name} of its config.yaml"
            )
        parameter.requires_grad_(manifest.parameters[name].trainable)
    names = {id(p): n for n, p in net.named_parameters()}
    scales = layer_scales(net, optim.layer_decay) if optim.layer_decay < 1 else {}
    saved = {g.get("name"): g for g in manifest.groups}
    peak = optim.lr * config.train.global_batch / optim.lr_batch
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for group in param_groups(net, optim.weight_decay):
        usual = {"lr": peak, "betas": optim.betas, "eps": optim.eps, "weight_decay": group["weight_decay"]}
        used = {**usual, **{k: v for k, v in saved.get(group["name"], {}).items() if k in usual}}
        used["betas"] = tuple(used["betas"])
        for parameter in group["params"]:
            name = names[id(parameter)]
            scale = scales.get(name, 1.0)
            # A learning rate schedule of torch looks for initial_lr.
            rates = {"lr": used["lr"] * scale, "initial_lr": peak * scale, "name": group["name"]}
            key = (group["name"], scale)
            groups.setdefault(key, {**used, **rates, "params": []})["params"].append(name)
    return list(groups.values())
