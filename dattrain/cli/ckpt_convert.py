"""``dattrain ckpt import`` and ``export``: checkpoints from and to other programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dattrain.errors import UserError


def add_actions(actions: Any) -> None:
    """The two parsers, added to those of ``dattrain ckpt`` (what ``add_subparsers`` gave)."""
    load = actions.add_parser("import", help="make a checkpoint of a run out of another program's")
    load.add_argument(
        "source",
        metavar="FOLDER",
        help="what engine.save_checkpoint or dcp.save was given, or torchtitan's folder of step-N",
    )
    load.add_argument(
        "run_dir", metavar="RUN", help="run folder with a config.yaml of the same model, as `train` writes it"
    )
    load.add_argument(
        "--from",
        dest="source_format",
        choices=("deepspeed", "dcp"),
        help="DeepSpeed's own layout or torch.distributed.checkpoint's (default: what FOLDER holds)",
    )
    load.add_argument("--tag", help="which of its checkpoints (default: the latest)")
    load.add_argument(
        "--samples-seen",
        type=int,
        metavar="N",
        help="position in the data (default: what it tells, as DeepSpeed's global_samples)",
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
        choices=("safetensors", "deepspeed", "dcp"),
        default="safetensors",
        help="safetensors with names and a config that timm loads, DeepSpeed's universal checkpoint, or "
        "torch.distributed.checkpoint's, with optimizer state",
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


def import_(args: argparse.Namespace) -> int:
    """Make a checkpoint of a run, and say what came in."""
    from dattrain.pretrained.import_checkpoint import import_checkpoint

    found = import_checkpoint(
        Path(args.source),
        Path(args.run_dir),
        source_format=args.source_format,
        tag=args.tag,
        samples_seen=args.samples_seen,
        trust=args.trust,
    )
    for note in found.source.notes:
        print(f"{args.source}: {note}")
    print(
        f"{found.folder}: step {found.source.step}, {found.samples_seen} samples, {len(found.source.parameters)} parameters, "
        f"{len(found.source.parts)} shards"
    )
    return 0


def export(args: argparse.Namespace) -> int:
    """Write a checkpoint for another program."""
    from dattrain.state.format import checkpoint, named

    folder, out = named.find(args.path, hint=True), Path(args.out)
    manifest = checkpoint.check(folder)
    if args.to == "deepspeed" and args.ema:
        raise UserError(
            "DeepSpeed's universal checkpoints have no place for averaged weights; export without --ema",
            exit_code=2,
        )
    if args.to == "dcp" and args.ema is not None:
        raise UserError(
            "--to dcp writes the trained weights under model and averaged ones under ema; "
            "export without --ema and --no-ema",
            exit_code=2,
        )
    try:
        if args.to == "deepspeed":
            from dattrain.state.convert.deepspeed_write import write_universal

            print(f"wrote {write_universal(folder, out)}")
            return 0
        from dattrain.pretrained import export_checkpoint

        if args.to == "dcp":
            print(f"wrote {export_checkpoint.export_dcp(folder, manifest, out)}")
            return 0
        ema = "ema" in manifest.states if args.ema is None else args.ema
        cfg = export_checkpoint.export_safetensors(folder, manifest, out, ema=ema)
    except OSError as e:
        raise UserError(f"{out}: {e.strerror or e}") from e
    print(
        f"wrote {out / 'model.safetensors'} ({'averaged' if ema else 'trained'} weights, {manifest.numel} parameters)"
    )
    if cfg is None:
        print(f"no config.json: {folder.parent.parent} holds no config.yaml that names the model")
    return 0
