"""``dattrain ckpt ls|inspect|verify|pin|prune|import|export``: look after the checkpoints of a run."""

from __future__ import annotations

import argparse
import errno
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dattrain.cli import ckpt_convert
from dattrain.errors import UserError
from dattrain.files import readable_size
from dattrain.runtime.progress import Progress
from dattrain.text import columns

if TYPE_CHECKING:
    from dattrain.config.schema import Config
    from dattrain.state.format.checkpoint import CheckpointInfo
    from dattrain.state.format.retention import Policy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    ls = actions.add_parser(
        "ls", help="the checkpoints of a run: step, samples, metric, size, world, stage, complete or not"
    )
    ls.add_argument("run_dir", metavar="RUN")
    ls.add_argument(
        "--metric", metavar="NAME", help="the metric to show (default: the recipe's checkpoint.metric)"
    )
    ls.add_argument("--json", action="store_true", help="as JSON")

    inspect = actions.add_parser("inspect", help="everything that a checkpoint says of itself")
    inspect.add_argument("path", metavar="RUN|CHECKPOINT", help="RUN@best and RUN@STEP name a checkpoint too")
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
        "--damaged", action="store_true", help="remove damaged ones too, if a complete one is left"
    )
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")

    ckpt_convert.add_actions(actions)


def run(args: argparse.Namespace) -> int:
    """Run the action; returns the exit code."""
    actions = {
        "ls": _ls,
        "inspect": _inspect,
        "verify": _verify,
        "pin": _pin,
        "prune": _prune,
        "import": ckpt_convert.import_,
        "export": ckpt_convert.export,
    }
    return actions[args.action](args)


# Looking


def _ls(args: argparse.Namespace) -> int:
    from dattrain.state.format import checkpoint, retention

    root = _root(args.run_dir)
    config = _recipe(root)
    metric = args.metric or (config.checkpoint.metric if config else "top1")
    found = checkpoint.list_all(root)
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
        row[4] = readable_size(int(row[4])) if row[4] else ""
    print("\n".join(columns([header, *table])))
    return 0


def _row(entry: CheckpointInfo, metric: str, kept: str) -> dict[str, Any]:
    m = entry.manifest
    return {
        "step": entry.step,
        "samples_seen": m.samples_seen if m else None,
        "epoch": m.meta.get("epoch") if m else None,
        "metric": entry.metric(metric),
        "bytes": m.nbytes if m else None,
        "world": m.world if m else None,
        "stage": m.stage if m else None,
        "precision": m.precision if m else None,
        "saved_at": m.saved_at if m else None,
        "kept": "pinned" if entry.pinned else kept,
        "state": "complete" if m else f"damaged: {entry.reason}",
    }


def _inspect(args: argparse.Namespace) -> int:
    from dattrain.state.format import checkpoint, named

    folder = named.find(args.path)
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
        "meta": {**m.meta, "metrics": {**m.meta.get("metrics", {}), **checkpoint.read_metrics(folder)}},
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
                print(f"  {k!s:<{width}}  {readable_size(v) if key == 'files' else _text(v)}")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            print(f"{key}:")
            for item in value:
                print("  " + ", ".join(f"{k}={v}" for k, v in item.items()))
        else:
            print(f"{key}: {readable_size(value) if key == 'bytes' else _text(value)}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from dattrain.config.run import split_checkpoint
    from dattrain.errors import Damaged
    from dattrain.state.format import checkpoint, named
    from dattrain.state.format.manifest import MANIFEST

    path = named.find(args.path) if split_checkpoint(args.path)[1] is not None else Path(args.path)
    if (path / MANIFEST).exists() or path.name.startswith("step_"):
        folders = [path]
    else:
        root = _root(args.path)
        folders = [entry.folder for entry in checkpoint.list_all(root)]
        if not folders:
            raise UserError(f"{root} holds no checkpoint")
    bad = 0
    for folder in folders:
        try:
            with Progress(folder.name, "bytes") as progress:
                manifest = checkpoint.verify(folder, progress)
        except Damaged as e:
            bad += 1
            print(f"{folder.name}: DAMAGED: {e}")
        else:
            print(f"{folder.name}: complete, {len(manifest.files)} files, {readable_size(manifest.nbytes)}")
    return 1 if bad else 0


# Keeping


def _pin(args: argparse.Namespace) -> int:
    from dattrain.state.format import checkpoint, named

    folder = named.find(args.path)
    mark = folder / checkpoint.PIN
    if args.off:
        mark.unlink(missing_ok=True)
    else:
        mark.touch()
    print(f"{folder.name} is {'no longer pinned' if args.off else 'pinned'}")
    return 0


def _prune(args: argparse.Namespace) -> int:
    import dataclasses

    from dattrain.runtime import owner

    root = _root(args.run_dir)
    given = {
        "keep_last": args.keep_last,
        "keep_every_epochs": args.keep_every_epochs,
        "keep_best": args.keep_best,
        "metric": args.metric,
    }
    try:
        policy = dataclasses.replace(
            _policy(_recipe(root)), **{k: v for k, v in given.items() if v is not None}
        )
    except ValueError as e:
        raise UserError(str(e), exit_code=2) from e
    if args.dry_run:
        return _remove(args, root, policy)
    run = root.parent if root.name == "checkpoints" else root
    try:
        hold = owner.acquire(run, "pruned")
    except UserError as e:
        if not isinstance(e.__cause__, OSError) or e.__cause__.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # Whoever wants room must not need some; nor can another training begin there.
        owner.refuse_if_in_use(run)
        return _remove(args, root, policy)
    with hold:
        return _remove(args, root, policy)


def _remove(args: argparse.Namespace, root: Path, policy: Policy) -> int:
    from dattrain.state.format import checkpoint, retention

    found = retention.confirmed(checkpoint.list_all(root), policy)
    gone = retention.to_remove(found, policy)
    if args.damaged:
        damaged = [e for e in found if e.manifest is None and not e.pinned]
        if damaged and len(damaged) == len(found):
            raise UserError(
                f"{checkpoint.none_complete(root, [(e.folder.name, e.reason) for e in damaged])}; they may be all there is"
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


# Shared


def _recipe(root: Path) -> Config | None:
    """The recipe of the run that ``root`` (its checkpoints folder) belongs to, None without a run around it."""
    from dattrain.config.load import load

    path = root.parent / "config.yaml"
    return load(path, []).config if path.is_file() else None


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


def _policy(config: Config | None) -> Policy:
    from dattrain.state.format.retention import Policy

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
