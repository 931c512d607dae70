"""``dattrain ckpt import`` and ``export``: checkpoints from and to other programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dattrain.errors import UserError

if TYPE_CHECKING:
    from dattrain.config.schema import Config
    from dattrain.state.checkpoint import Manifest


def import_deepspeed(args: argparse.Namespace) -> int:
    """``ckpt import FOLDER RUN``; returns the exit code."""
    import datetime

    from dattrain.runtime import owner
    from dattrain.runtime.health import Verdicts
    from dattrain.state import checkpoint, deepspeed_read, offline
    from dattrain.state.checkpoint import Manifest
    from dattrain.state.checkpointer import describe

    run_dir, source_dir = Path(args.run_dir), Path(args.source)
    if not source_dir.is_dir():
        raise UserError(f"{source_dir} is no folder")
    config = recipe(run_dir / "checkpoints")
    if config is None:
        raise UserError(
            f"{run_dir} has no config.yaml: it says which model and data the checkpoint goes on with"
        )
    root = run_dir / "checkpoints"
    source = deepspeed_read.read(source_dir, tag=args.tag, trust=args.trust)
    _check_model(config, source.parameters)
    samples = source.samples if args.samples_seen is None else args.samples_seen
    if (root / checkpoint.folder_name(source.step)).exists():
        raise UserError(f"{root} already holds a checkpoint of step {source.step}")
    description = describe(config)
    manifest = Manifest(
        step=source.step,
        samples_seen=samples,
        world=0,
        stage=source.stage,
        precision=description.precision,
        states=("param", "exp_avg", "exp_avg_sq"),
        parameters=source.parameters,
        buffers=source.buffers,
        engine=source.engine,
        groups=source.groups,
        meta={
            "step": source.step,
            "samples_seen": samples,
            "img_size": config.model.img_size,
            "metrics": {},
            "health": Verdicts(1, 0).state(),
            "bad_samples": 0,
            "imported_from": f"DeepSpeed: {source_dir.name}",
        },
        config_sha256=description.config_sha256,
        versions=description.versions,
        saved_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )
    try:
        with owner.take(run_dir, "imported into"):
            folder = offline.write_checkpoint(root, manifest, source.parts)
    except OSError as e:
        raise UserError(f"{root}: the checkpoint could not be written: {e.strerror or e}") from e
    print(
        f"{folder}: step {source.step}, {samples} samples, {len(source.parameters)} parameters, {len(source.parts)} shards"
    )
    return 0


def _check_model(config: Config, parameters: Any) -> None:
    import torch

    from dattrain.models import zoo
    from dattrain.state.checkpoint import Manifest, Parameter
    from dattrain.state.elastic import check_fits

    model = config.model
    with torch.device("meta"):
        net = zoo.create(
            model.name,
            num_classes=model.num_classes,
            img_size=model.img_size,
            in_chans=model.in_chans,
            **model.overrides,
        )
    ours = {
        n: Parameter(tuple(p.shape), parameters[n].trainable if n in parameters else True)
        for n, p in net.named_parameters()
    }
    check_fits(ours, Manifest(0, 0, 0, 0, "", (), parameters), {})


def export(args: argparse.Namespace) -> int:
    """``ckpt export RUN|CHECKPOINT FOLDER``; returns the exit code."""
    from dattrain.state import checkpoint

    folder, out = checkpoint.locate(Path(args.path)), Path(args.out)
    manifest = checkpoint.check(folder)
    try:
        if args.to == "deepspeed":
            if args.ema:
                raise UserError(
                    "DeepSpeed's universal checkpoints have no place for averaged weights; export without --ema",
                    exit_code=2,
                )
            from dattrain.state.deepspeed_write import write_universal

            print(f"wrote {write_universal(folder, out)}")
            return 0
        ema = "ema" in manifest.states if args.ema is None else args.ema
        _export_safetensors(folder, manifest, out, ema)
    except OSError as e:
        raise UserError(f"{out}: {e.strerror or e}") from e
    return 0


def _export_safetensors(folder: Path, manifest: Manifest, out: Path, ema: bool) -> None:
    from itertools import chain

    from dattrain.state import gather, offline
    from dattrain.state.elastic import DTYPE_NAMES
    from dattrain.tools.export import write_timm_config
    from dattrain.tools.weights import METADATA_KEY, card_of_checkpoint

    state: gather.State = "ema" if ema else "param"
    if ema and "ema" not in manifest.states:
        raise UserError(f"{folder} holds no averaged weights; export without --ema")
    card = card_of_checkpoint(folder, manifest, ema=ema)
    buffers = gather.load_buffers(folder)
    shapes = {n: ("F32", p.shape) for n, p in manifest.parameters.items()}
    shapes.update({n: (DTYPE_NAMES[b.dtype], tuple(b.shape)) for n, b in buffers.items()})
    metadata = {"format": "pt"}
    out.mkdir(parents=True, exist_ok=True)
    if card is not None:
        metadata[METADATA_KEY] = card.to_json()
        write_timm_config(card, out)
    tensors = chain(gather.iter_tensors(folder, state), buffers.items())
    offline.stream_file(out / "model.safetensors", tensors, shapes, metadata)
    print(
        f"wrote {out / 'model.safetensors'} ({'averaged' if ema else 'trained'} weights, {manifest.numel} parameters)"
    )
    if card is None:
        print(f"no config.json: {folder.parent.parent} holds no config.yaml that names the model")


def recipe(root: Path) -> Config | None:
    """The recipe of the run that ``root`` (its checkpoints folder) belongs to, None without a run around it."""
    from dattrain.config.load import load

    path = root.parent / "config.yaml"
    return load(path, []).config if path.is_file() else None
