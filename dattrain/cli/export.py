"""``dattrain export``: weights and graphs for other programs, each loaded back and compared on real images.

Formats: ``safetensors`` (ours), ``authors`` (their names, with their YAML), ``timm`` (a folder that
``timm.create_model("local-dir:...")`` takes), ``onnx`` and ``torch.export`` (one graph per image size, any batch size).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dattrain.cli.loading import loading
from dattrain.errors import ConfigError, UserError
from dattrain.pretrained.formats import FORMATS, GRAPHS, LOWEST_OPSET, output_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", metavar="RUN|CHECKPOINT|FILE", help="whose weights, as for dattrain eval")
    parser.add_argument("--to", choices=FORMATS, required=True, help="what to write")
    parser.add_argument("--out", type=Path, required=True, help="the file, or the folder for timm")
    parser.add_argument(
        "--img-size",
        action="append",
        type=int,
        nargs="+",
        metavar="N",
        help="N, or HEIGHT WIDTH; again for another graph of onnx and torch.export (default: as trained)",
    )
    parser.add_argument(
        "--bias-table", choices=("resize", "sample"), default="resize", help="see dattrain eval"
    )
    parser.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, help="averaged weights (default: where there are any)"
    )
    parser.add_argument(
        "--images", nargs="+", metavar="IMAGE", help="what to compare on (default: eight of the demo's)"
    )
    parser.add_argument("--opset", type=int, default=20, help=f"of ONNX, from {LOWEST_OPSET} (default: 20)")
    parser.add_argument("--force", action="store_true", help="replace what is at --out")


def run(args: argparse.Namespace) -> int:
    """Write, load back, compare; an export that does not give the model's logits is an error."""
    with loading("torch"):
        from dattrain.pretrained.export import write
        from dattrain.pretrained.exported import compare, images_for
        from dattrain.pretrained.preprocess import image_size
        from dattrain.pretrained.weights import load_model

    sizes = [image_size(values) for values in args.img_size or [None]]
    if len(sizes) > 1 and args.to not in GRAPHS:
        raise ConfigError(f"--to {args.to} holds one set of weights: give one --img-size")
    for size in sizes:
        model, cfg = load_model(args.model, ema=args.ema, img_size=size, bias_table=args.bias_table)
        out = output_path(args.out, args.to, cfg.img_size if len(sizes) > 1 else None)
        if out.exists() and not args.force:
            raise UserError(f"{out}: exists; choose another --out, or --force")
        out.parent.mkdir(parents=True, exist_ok=True)
        item = write(model, cfg, args.to, out, opset=args.opset)
        difference, same = compare(model, item, images_for(cfg, args.images))
        print(
            f"{item.path}: largest difference of logits {difference:.1e} of the largest, same best class on {same}"
        )
        if difference > item.tolerance:
            raise UserError(
                f"{item.path}: does not give the model's logits (more than {item.tolerance:g}); do not use it"
            )
    return 0
