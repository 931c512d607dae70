"""``dattrain ckpt ls|inspect|verify|pin|prune|import|export``: look after the checkpoints of a run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dattrain.errors import UserError

if TYPE_CHECKING:
    from dattrain.config.schema import Config
    from dattrain.state.checkpoint import Entry, Manifest
    from dattrain.state.retention import Policy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    ls = actions.add_parser(
        "ls", help="the checkpoints of a run: step, samples, metric, size, world, stage, whole or not"
    )
    ls.add_argument("run_dir", metavar="RUN")
    ls.add_argument(
        "--metric", metavar="NAME", help="the metric to show (default: the recipe's checkpoint.metric)"
    )
    ls.add_argument("--json", action="store_true", help="as JSON")

    inspect = actions.add_parser("inspect", help="everything that a checkpoint says of itself")
    inspect.add_argument("path", metavar="RUN|CHECKPOINT")
    inspect.add_argument("--tensors", action="store_true", help="list every parameter and buffer")
    inspect.add_argument("--json", action="store_true", help="as JSON")

    verify = actions.add_parser(
        "verify", help="read every byte against its checksum; exit code 1 if one is damaged"
    )
    verify.add_argument("path", metavar="RUN|CHECKPOINT")

    pin = actions.add_parser("pin", help="keep a checkpoint whatever the retention says")
    pin.add_argument("path", metavar="CHECKPOINT")
    pin.add_argument("--off", action="store_true", help="take the pin away")

    prune = actions.add_parser("prune", help="remove what the recipe's retention does not keep")
    prune.add_argument("run_dir", metavar="RUN")
    prune.add_argument("--keep-last", type=int, metavar="K", help="instead of checkpoint.keep_last")
    prune.add_argument(
        "--keep-every-epochs", type=float, metavar="N", help="instead of checkpoint.keep_every_epochs"
    )
    prune.add_argument("--keep-best", type=int, metavar="K", help="instead of checkpoint.keep_best")
    prune.add_argument("--metric", metavar="NAME", help="instead of checkpoint.metric")
    prune.add_argument(
        "--damaged", action="store_true", help="remove damaged ones too, if a whole one is left"
    )
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")

    load = actions.add_parser("import", help="make a checkpoint of a run out of DeepSpeed's own")
    load.add_argument("source", metavar="FOLDER", help="what engine.save_checkpoint was given")
    load.add_argument(
        "run_dir", metavar="RUN", help="run folder with a config.yaml of the same model, as `train` writes it"
    )
    load.add_argument("--tag", help="which of its checkpoints (default: the latest)")
    load.add_argument(
        "--samples-seen",
        type=int,
        metavar="N",
        help="position in the data (default: DeepSpeed's global_samples)",
    )
    load.add_argument(
        "--trust", action="store_true", help="unpickle what cannot be read otherwise: it may run any code"
    )

    export = actions.add_parser(
        "export", help="write a checkpoint for other programs, gathering one tensor at a time"
    )
    export.add_argument("path", metavar="RUN|CHECKPOINT")
    export.add_argument("out", metavar="FOLDER")
    export.add_argument(
        "--to",
        choices=("safetensors", "deepspeed"),
        default="safetensors",
        help="safetensors with names and a config that timm loads, or DeepSpeed's universal checkpoint",
    )
    which = export.add_mutually_exclusive_group()
    which.add_argument(
        "--ema",
        dest="ema",
        action="store_true",
        default=None,
        help="the averaged weights (default if there are any)",
    )
    which.add_argument("--no-ema", dest="ema", action="store_false", help="the trained weights")


def run(args: argparse.Namespace) -> int:
    """Run the action; returns the exit code."""
    actions = {
        "ls": _ls,
        "inspect": _inspect,
        "verify": _verify,
        "pin": _pin,
        "prune": _prune,
        "import": _import,
        "export": _export,
    }
    return actions[args.action](args)


# Looking


def _ls(args: argparse.Namespace) -> int:
    from dattrain.state import checkpoint, retention

    root = _root(args.run_dir)
    config = _config(root)
    metric = args.metric or (config.checkpoint.metric if config else "top1")
    found = checkpoint.entries(root)
    kept = retention.kept(found, _policy(config))
    rows = [_row(entry, metric, kept.get(entry.folder.name, "")) for entry in found]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    if not rows:
        print(f"{root} holds no checkpoint")
        return 0
    header = [
        "step",
        "samples",
        "epoch",
        metric,
        "size",
        "world",
        "stage",
        "precision",
        "saved",
        "kept as",
        "state",
    ]
    table = [[_text(row[k]) for k in row] for row in rows]
    for row in table:
        row[4] = _bytes(int(row[4])) if row[4] else ""
    _print_table(header, table)
    return 0


def _row(entry: Entry, metric: str, kept: str) -> dict[str, Any]:
    m = entry.manifest
    return {
        "step": entry.step,
        "samples_seen": m.samples_seen if m else None,
        "epoch": m.meta.get("epoch") if m else None,
        "metric": m.metric(metric) if m else None,
        "bytes": m.nbytes if m else None,
        "world": m.world if m else None,
        "stage": m.stage if m else None,
        "precision": m.precision if m else None,
        "saved_at": m.saved_at if m else None,
        "kept": "pinned" if entry.pinned else kept,
        "state": "whole" if m else f"damaged: {entry.reason}",
    }


def _inspect(args: argparse.Namespace) -> int:
    from dattrain.state import checkpoint

    folder = checkpoint.locate(Path(args.path))
    m = checkpoint.check(folder)
    facts: dict[str, Any] = {
        "folder": str(folder),
        "step": m.step,
        "samples_seen": m.samples_seen,
        "saved_at": m.saved_at,
        "world": m.world,
        "stage": m.stage,
        "precision": m.precision,
        "states": list(m.states),
        "parameters": m.numel,
        "trainable": sum(p.numel for p in m.parameters.values() if p.trainable),
        "bytes": m.nbytes,
        "pinned": (folder / checkpoint.PIN).exists(),
        "config_sha256": m.config_sha256,
        "versions": dict(m.versions),
        "engine": dict(m.engine),
        "groups": [dict(g) for g in m.groups],
        "meta": dict(m.meta),
        "files": {name: digest.size for name, digest in m.files.items()},
    }
    if args.tensors:
        facts["tensors"] = {
            n: {"shape": list(p.shape), "trainable": p.trainable, "opt_step": p.opt_step}
            for n, p in m.parameters.items()
        }
        facts["buffers"] = list(m.buffers)
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            print(f"{key}:")
            width = max(len(str(k)) for k in value)
            for k, v in value.items():
                print(f"  {k!s:<{width}}  {_bytes(v) if key == 'files' else _text(v)}")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            print(f"{key}:")
            for item in value:
                print("  " + ", ".join(f"{k}={v}" for k, v in item.items()))
        else:
            print(f"{key}: {_bytes(value) if key == 'bytes' else _text(value)}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from dattrain.state import checkpoint
    from dattrain.state.shards import Damaged

    path = Path(args.path)
    if (path / checkpoint.MANIFEST).exists() or path.name.startswith("step_"):
        folders = [path]
    else:
        root = _root(args.path)
        folders = [entry.folder for entry in checkpoint.entries(root)]
        if not folders:
            raise UserError(f"{root} holds no checkpoint")
    bad = 0
    for folder in folders:
        try:
            manifest = checkpoint.verify(folder, _Progress(folder.name))
        except Damaged as e:
            bad += 1
            print(f"{folder.name}: DAMAGED: {e}")
        else:
            print(f"{folder.name}: whole, {len(manifest.files)} files, {_bytes(manifest.nbytes)}")
    return 1 if bad else 0


class _Progress:
    """A line on a terminal that says how much has been read."""

    def __init__(self, name: str) -> None:
        self._name, self._read, self._shown = name, 0, 0

    def __call__(self, count: int) -> None:
        self._read += count
        if sys.stderr.isatty() and self._read - self._shown > 64 << 20:
            self._shown = self._read
            print(f"\r{self._name}: {_bytes(self._read)} ", end="\r", file=sys.stderr, flush=True)


# Keeping


def _pin(args: argparse.Namespace) -> int:
    from dattrain.state import checkpoint

    folder = checkpoint.locate(Path(args.path))
    mark = folder / checkpoint.PIN
    if args.off:
        mark.unlink(missing_ok=True)
    else:
        mark.touch()
    print(f"{folder.name} is {'no longer pinned' if args.off else 'pinned'}")
    return 0


def _prune(args: argparse.Namespace) -> int:
    import dataclasses

    from dattrain.state import checkpoint, retention

    root = _root(args.run_dir)
    given = {
        "keep_last": args.keep_last,
        "keep_every_epochs": args.keep_every_epochs,
        "keep_best": args.keep_best,
        "metric": args.metric,
    }
    try:
        policy = dataclasses.replace(
            _policy(_config(root)), **{k: v for k, v in given.items() if v is not None}
        )
    except ValueError as e:
        raise UserError(str(e), exit_code=2) from e
    found = checkpoint.entries(root)
    gone = retention.doomed(found, policy)
    if args.damaged:
        damaged = [e for e in found if e.manifest is None and not e.pinned]
        if damaged and len(damaged) == len(found):
            raise UserError(
                f"{checkpoint.none_whole(root, [(e.folder.name, e.reason) for e in damaged])}; they may be all there is"
            )
        gone = sorted([*gone, *damaged], key=lambda e: e.step)
    for entry in gone:
        if not args.dry_run:
            checkpoint.remove(entry.folder)
        print(f"{'would remove' if args.dry_run else 'removed'} {entry.folder.name}")
    kept = retention.kept(found, policy)
    names = {e.folder.name for e in gone}
    for entry in found:
        if entry.folder.name not in names:
            print(f"kept {entry.folder.name} ({kept.get(entry.folder.name) or 'damaged: ' + entry.reason})")
    return 0


# From and to others


def _import(args: argparse.Namespace) -> int:
    import datetime

    from dattrain.runtime.health import Verdicts
    from dattrain.state import checkpoint, deepspeed_read, offline
    from dattrain.state.checkpoint import Manifest
    from dattrain.state.checkpointer import describe

    run_dir, source_dir = Path(args.run_dir), Path(args.source)
    if not source_dir.is_dir():
        raise UserError(f"{source_dir} is no folder")
    config = _config(run_dir / "checkpoints")
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


def _export(args: argparse.Namespace) -> int:
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
    from dattrain.tools.weights import METADATA_KEY, card_of

    state: gather.State = "ema" if ema else "param"
    if ema and "ema" not in manifest.states:
        raise UserError(f"{folder} holds no averaged weights; export without --ema")
    config = _config(folder.parent)
    buffers = gather.load_buffers(folder)
    shapes = {n: ("F32", p.shape) for n, p in manifest.parameters.items()}
    shapes.update({n: (DTYPE_NAMES[b.dtype], tuple(b.shape)) for n, b in buffers.items()})
    metadata = {"format": "pt"}
    out.mkdir(parents=True, exist_ok=True)
    if config is not None:
        what = f"step {manifest.step}" + (", EMA" if ema else "")
        metadata[METADATA_KEY] = card_of(config, source=f"{config.name}, {what}").to_json()
        (out / "config.json").write_text(json.dumps(timm_config(config), indent=2) + "\n")
    tensors = chain(gather.iter_tensors(folder, state), buffers.items())
    offline.stream_file(out / "model.safetensors", tensors, shapes, metadata)
    print(
        f"wrote {out / 'model.safetensors'} ({'averaged' if ema else 'trained'} weights, {manifest.numel} parameters)"
    )
    if config is None:
        print(f"no config.json: {folder.parent.parent} holds no config.yaml that names the model")


def timm_config(config: Config) -> dict[str, Any]:
    """``config.json`` with which ``timm.create_model("local-dir:FOLDER")`` builds the model, after ``import dattrain.models``."""
    model, augment = config.model, config.augment
    height, width = (model.img_size,) * 2 if isinstance(model.img_size, int) else model.img_size
    return {
        "architecture": model.name,
        "num_classes": model.num_classes,
        "global_pool": "avg",
        "model_args": {"img_size": [height, width], "in_chans": model.in_chans, **model.overrides},
        "pretrained_cfg": {
            "num_classes": model.num_classes,
            "input_size": [model.in_chans, height, width],
            "interpolation": augment.interpolation,
            "crop_pct": config.eval.crop_pct,
            "crop_mode": "squash" if config.eval.resize == "squash" else "center",
            "mean": list(augment.mean),
            "std": list(augment.std),
            "first_conv": "patch_embed.proj",
            "classifier": "head.fc",
        },
    }


# Shared


def _root(path: str) -> Path:
    folder = Path(path)
    if folder.name == "checkpoints" and folder.is_dir():
        return folder
    if (folder / "checkpoints").is_dir():
        return folder / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{folder} is no run folder")
    if any(folder.glob("step_*")):
        return folder
    raise UserError(f"{folder} holds no checkpoints folder")


def _config(root: Path) -> Config | None:
    """The recipe of the run that ``root`` (its checkpoints folder) belongs to, None without a run around it."""
    from dattrain.config.load import load

    path = root.parent / "config.yaml"
    return load(path, []).config if path.is_file() else None


def _policy(config: Config | None) -> Policy:
    from dattrain.state.retention import Policy

    if config is None:
        return Policy()
    c = config.checkpoint
    return Policy(c.keep_last, c.keep_every_epochs, c.keep_best, c.metric)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(v) for v in value)
    return str(value)


def _bytes(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.4g} GB"


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
