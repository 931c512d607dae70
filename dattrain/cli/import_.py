"""``dattrain import FILE``: weights that the authors released, DAT (CVPR 2022) and DAT++, become a file of ours."""

from __future__ import annotations

import argparse
from pathlib import Path

from dattrain.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="a .pth or .safetensors file in the authors' names"
    )
    parser.add_argument("--out", type=Path, help="what to write (default: FILE with .safetensors)")
    parser.add_argument(
        "--config",
        type=Path,
        help="the authors' YAML with MODEL.DAT, for models that tensors alone do not tell (default: from the file, or "
        "inferred from names and shapes)",
    )
    parser.add_argument("--force", action="store_true", help="replace what is at --out")


def run(args: argparse.Namespace) -> int:
    """Read, check that writing it back gives the same tensors, and save what ``eval`` reads as the same model."""
    from dattrain.pretrained import import_authors, weights

    out: Path = args.out or default_out(args.file)
    if out.exists() and not args.force:
        raise UserError(f"{out}: exists; choose another --out, or --force")
    model, cfg, origin = import_authors.read(args.file, args.config)
    weights.save(out, model.state_dict(), cfg, model=model)
    count = sum(p.numel() for p in model.parameters())
    settings = "".join(f", {key}={value}" for key, value in (cfg.overrides or {}).items())
    height, width = cfg.img_size
    head = f"{cfg.num_classes} classes" if cfg.num_classes else "no classification head"
    print(f"{args.file}: {cfg.name}{settings}, {height} x {width}, {head}, {count / 1e6:.3f}M parameters")
    print(f"architecture {origin}; written back in the authors' names, every tensor is identical")
    print(out)
    return 0


def default_out(file: Path) -> Path:
    """FILE with .safetensors; with .dattrain.safetensors where FILE is one already."""
    return file.with_suffix(".dattrain.safetensors" if file.suffix == ".safetensors" else ".safetensors")
