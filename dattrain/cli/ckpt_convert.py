"""``dattrain ckpt import`` and ``export``: checkpoints from and to other programs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dattrain.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from dattrain.config.schema import Config
    from dattrain.models.dat import DAT
    from dattrain.state.convert.offline import Source
    from dattrain.state.format.checkpoint import Manifest


def import_(args: argparse.Namespace) -> int:
    """``ckpt import FOLDER RUN``; returns the exit code."""
    import datetime

    from dattrain.runtime import owner
    from dattrain.state.checkpointer import describe
    from dattrain.state.convert import offline
    from dattrain.state.format import checkpoint
    from dattrain.state.format.checkpoint import Manifest

    run_dir, source_dir = Path(args.run_dir), Path(args.source)
    if not source_dir.is_dir():
        raise UserError(f"{source_dir} is no folder")
    config = recipe(run_dir / "checkpoints")
    if config is None:
        raise UserError(
            f"{run_dir} has no config.yaml: it says which model and data the checkpoint goes on with"
        )
    root = run_dir / "checkpoints"
    program, source = _read(args, source_dir, config)
    samples = source.samples if args.samples_seen is None else args.samples_seen
    if samples is None:
        samples = _samples_of_start(source, source_dir, config)
    if (root / checkpoint.folder_name(source.step)).exists():
        raise UserError(f"{root} already holds a checkpoint of step {source.step}")
    description = describe(config)
    counters = {"global_steps": source.step, "global_samples": samples, "skipped_steps": 0}
    manifest = Manifest(
        step=source.step,
        samples_seen=samples,
        world=0,
        stage=source.stage,
        precision=description.precision,
        states=source.states,
        parameters=source.parameters,
        buffers=source.buffers,
        engine=source.engine or {**counters, "loss_scaler": None},
        groups=source.groups,
        meta=_meta(config, source, samples) | {"imported_from": f"{program}: {source_dir.name}"},
        config_sha256=description.config_sha256,
        versions=description.versions,
        saved_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )
    try:
        with owner.take(run_dir, "imported into"):
            folder = offline.write_checkpoint(root, manifest, source.parts)
    except OSError as e:
        raise UserError(f"{root}: the checkpoint could not be written: {e.strerror or e}") from e
    for note in source.notes:
        print(f"{source_dir}: {note}")
    print(
        f"{folder}: step {source.step}, {samples} samples, {len(source.parameters)} parameters, {len(source.parts)} shards"
    )
    return 0


def _read(args: argparse.Namespace, folder: Path, config: Config) -> tuple[str, Source]:
    """The name of the program that wrote ``folder``, and what it holds, which is of the recipe's model."""
    from dattrain.state.convert import dcp_read, dcp_store, deepspeed_read

    found = dcp_store.find(folder, args.tag)
    listed = found is not None and (found / dcp_store.METADATA).exists()
    looks = "dcp" if listed or (found and not (folder / "latest").exists()) else "deepspeed"
    if (args.source_format or looks) == "deepspeed":
        source = deepspeed_read.read(folder, tag=args.tag, trust=args.trust)
        _check_model(config, source, {})
        return "DeepSpeed", source
    net = _network(config, config.model.img_size)
    parameters = [n for n, _ in net.named_parameters()]
    buffers = {n: b for n, b in net.state_dict().items() if n not in set(parameters)}
    source = dcp_read.read(folder, parameters, list(buffers), tag=args.tag, trust=args.trust)
    _check_model(config, source, buffers)
    return "DCP", source


def _samples_of_start(source: Source, folder: Path, config: Config) -> int:
    if source.step:
        batch = config.train.global_batch
        raise UserError(
            f"{folder} does not tell the position in the data; give --samples-seen: {source.step} updates "
            f"of train.global_batch={batch} are {source.step * batch}"
        )
    return 0


def _meta(config: Config, source: Source, samples: int) -> dict[str, Any]:
    from dattrain.runtime.health import Verdicts

    fresh = {
        "img_size": config.model.img_size,
        "metrics": {},
        "health": Verdicts(1, 0).state(),
        "bad_samples": 0,
    }
    return {**fresh, **source.meta, "step": source.step, "samples_seen": samples}


def _network(config: Config, img_size: Any) -> DAT:
    """The recipe's model laid out for ``img_size``, without memory, frozen as the recipe says."""
    import torch

    from dattrain.engine.optim import freeze_backbone
    from dattrain.models import zoo

    model = config.model
    with torch.device("meta"):
        net = zoo.create(
            model.name,
            num_classes=model.num_classes,
            img_size=tuple(img_size) if isinstance(img_size, list) else img_size,
            in_chans=model.in_chans,
            **model.overrides,
        )
    if config.optim.freeze_backbone:
        freeze_backbone(net)
    return net


def _check_model(config: Config, source: Source, buffers: Mapping[str, Tensor]) -> None:
    from dattrain.models import surgery
    from dattrain.state.format.checkpoint import Manifest, Parameter
    from dattrain.state.load import check_fits

    net = _network(config, source.meta.get("img_size", config.model.img_size))
    if config.init.bias_table == "sample":
        surgery.adopt_tables(net, {n: p.shape for n, p in source.parameters.items()})
    ours = {n: Parameter(tuple(p.shape), p.requires_grad) for n, p in net.named_parameters()}
    theirs = Manifest(source.step, 0, 0, 0, "", (), source.parameters, source.buffers)
    check_fits(ours, theirs, buffers)


def export(args: argparse.Namespace) -> int:
    """``ckpt export RUN|CHECKPOINT FOLDER``; returns the exit code."""
    from dattrain.state.format import checkpoint

    folder, out = checkpoint.locate(Path(args.path)), Path(args.out)
    manifest = checkpoint.check(folder)
    try:
        if args.to == "deepspeed":
            if args.ema:
                raise UserError(
                    "DeepSpeed's universal checkpoints have no place for averaged weights; export without --ema",
                    exit_code=2,
                )
            from dattrain.state.convert.deepspeed_write import write_universal

            print(f"wrote {write_universal(folder, out)}")
            return 0
        if args.to == "dcp":
            if args.ema is not None:
                raise UserError(
                    "--to dcp writes the trained weights under model and averaged ones under ema; "
                    "export without --ema and --no-ema",
                    exit_code=2,
                )
            from dattrain.state.convert.dcp_write import write

            print(f"wrote {write(folder, out, _groups(folder, manifest))}")
            return 0
        ema = "ema" in manifest.states if args.ema is None else args.ema
        _export_safetensors(folder, manifest, out, ema)
    except OSError as e:
        raise UserError(f"{out}: {e.strerror or e}") from e
    return 0


def _groups(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """The recipe's optimizer groups with names for parameters and rates as they were; one per rate under layer_decay."""
    from dattrain.engine.optim import layer_scales, param_groups
    from dattrain.pretrained.weights import config_of

    config = config_of(folder)
    if config is None:
        raise UserError(
            f"{folder}: no config.yaml in the run folder around it says which parameters decay; "
            "put the run's config.yaml beside its checkpoints"
        )
    optim = config.optim
    net = _network(config, manifest.meta.get("img_size", config.model.img_size))
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


def _export_safetensors(folder: Path, manifest: Manifest, out: Path, ema: bool) -> None:
    from itertools import chain

    from dattrain.pretrained.export_timm import write_timm_config
    from dattrain.pretrained.weights import METADATA_KEY, cfg_of_checkpoint
    from dattrain.state import gather
    from dattrain.state.convert import offline
    from dattrain.state.load import DTYPE_NAMES

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
        write_timm_config(cfg, out)
    tensors = chain(gather.iter_tensors(folder, state), buffers.items())
    offline.stream_file(out / "model.safetensors", tensors, shapes, metadata)
    print(
        f"wrote {out / 'model.safetensors'} ({'averaged' if ema else 'trained'} weights, {manifest.numel} parameters)"
    )
    if cfg is None:
        print(f"no config.json: {folder.parent.parent} holds no config.yaml that names the model")


def recipe(root: Path) -> Config | None:
    """The recipe of the run that ``root`` (its checkpoints folder) belongs to, None without a run around it."""
    from dattrain.config.load import load

    path = root.parent / "config.yaml"
    return load(path, []).config if path.is_file() else None
