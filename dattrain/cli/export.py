"""``dattrain export``: weights and graphs for other programs, each loaded back and compared on real images.

Formats: ``safetensors`` (ours), ``authors`` (their names, with their YAML), ``timm`` (a folder that
``timm.create_model("local-dir:...")`` takes), ``hub`` (that folder with a model card, as it is uploaded), ``onnx`` and ``torch.export`` (one graph per image size, any batch size).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dattrain.cli.loading import loading
from dattrain.errors import ConfigError, UserError
from dattrain.pretrained.formats import FORMATS, GRAPHS, LOWEST_OPSET, output_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "model", nargs="?", metavar="RUN|CHECKPOINT|FILE", help="whose weights, as for dattrain eval"
    )
    parser.add_argument(
        "--to",
        nargs="+",
        required=True,
        metavar=("FORMAT", "OUT"),
        help=f"what to write ({', '.join(FORMATS)}), and where",
    )
    parser.add_argument(
        "--out", type=Path, help="the file, or the folder for timm and hub, where --to does not name it"
    )
    parser.add_argument(
        "--img-size",
        action="append",
        type=int,
        nargs="+",
        metavar="N",
        help="N, or HEIGHT WIDTH; again for another graph of onnx and torch.export (default: as trained)",
    )
    parser.add_argument("--bias-table", choices=("resize", "sample"), help="see dattrain eval")
    parser.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, help="averaged weights (default: where there are any)"
    )
    parser.add_argument(
        "--images", nargs="+", metavar="IMAGE", help="what to compare on (default: eight of the demo's)"
    )
    parser.add_argument("--opset", type=int, default=20, help=f"of ONNX, from {LOWEST_OPSET} (default: 20)")
    parser.add_argument("--force", action="store_true", help="replace what is at --out")


def run(args: argparse.Namespace) -> int:
    """Write, load back, compare; an export that does not give what the model gives is an error."""
    with loading("torch"):
        from dattrain.pretrained.export import write
        from dattrain.pretrained.exported import compare, images_for
        from dattrain.pretrained.preprocess import image_size
        from dattrain.pretrained.weights import load_model

    source, to, path = _target(args.model, args.to, args.out)
    sizes = [image_size(values) for values in args.img_size or [None]]
    if len(sizes) > 1 and to not in GRAPHS:
        raise ConfigError(f"--to {to} holds one set of weights: give one --img-size")
    for size in sizes:
        model, cfg = load_model(source, ema=args.ema, img_size=size, bias_table=args.bias_table)
        out = output_path(path, to, cfg.img_size if len(sizes) > 1 else None)
        if out.exists() and not args.force:
            raise UserError(f"{out}: exists; choose another --out, or --force")
        out.parent.mkdir(parents=True, exist_ok=True)
        item = write(model, cfg, to, out, opset=args.opset, source=source)
        difference, same = compare(model, item, images_for(cfg, args.images))
        what = {"segmentation": "same class of every pixel", "detection": "same objects"}.get(
            cfg.task, "same best class"
        )
        numbers = "outputs" if cfg.task == "detection" else "logits"
        print(
            f"{item.path}: largest difference of {numbers} {difference:.1e} of the largest, {what} on {same}"
        )
        if difference > item.tolerance:
            raise UserError(
                f"{item.path}: does not give the model's {numbers} (more than {item.tolerance:g}); do not use it"
            )
    if to == "hub":
        print(
            f"{path / 'README.md'}: states no license: add one to its first block before you upload the folder"
        )
    return 0


def _target(model: str | None, to: list[str], out: Path | None) -> tuple[str, str, Path]:
    """Weights, format and place. Raises ConfigError for what is neither ``--to FORMAT OUT`` nor ``--to FORMAT --out OUT``."""
    name, *places = to
    if name not in FORMATS:
        raise ConfigError(f"--to {name} is none of {', '.join(FORMATS)}")
    if model is None and places:
        model = places.pop(0)  # that stood behind --to
    if model is None:
        raise ConfigError("which weights? give a run, a checkpoint or a file")
    if len(places) + (out is not None) != 1:
        raise ConfigError(f"--to {' '.join(to)}: give one place to write to, as in --to {name} OUT")
    return model, name, out or Path(places[0])
