"""``dattrain viz points|offsets|attention``: where a model's deformable attention looks, drawn on images.

``draw_points`` puts one image with its sampling points on a matplotlib axis of the caller's. What is drawn comes from
``points``; the pictures from ``draw`` (PNG) and ``page`` (HTML).
"""

from __future__ import annotations

import argparse
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from dattrain.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from torch import Tensor, nn

    from dattrain.pretrained.pretrained_cfg import PretrainedCfg
    from dattrain.visualize.sampling_points import Deformed

KINDS = ("points", "offsets", "attention")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "kind", choices=KINDS, help="sampling points, their shifts, or the keys that a query reads"
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN|CHECKPOINT|FILE", help="whose attention to draw"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("viz"), help="folder for the pictures (default: viz)"
    )
    parser.add_argument(
        "--img-size", type=int, nargs="+", metavar="N", help="another size: N, or HEIGHT WIDTH"
    )
    parser.add_argument("--stage", type=int, help="only this stage, from 1")
    parser.add_argument("--block", type=int, help="only this block of the stage, from 0")
    parser.add_argument(
        "--every", action="store_true", help="every deformable block, not just the last of each stage"
    )
    parser.add_argument(
        "--query",
        type=float,
        nargs=2,
        default=(0.5, 0.5),
        metavar=("Y", "X"),
        help="the query's place as fractions of the image, for attention (default: the middle)",
    )
    parser.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, help="averaged weights (default: where there are any)"
    )
    parser.add_argument("--device", default="cpu")


def run(args: argparse.Namespace) -> int:
    """Draw one PNG per image, and one HTML page of them all where blocks, groups and queries can be chosen."""
    from dattrain.pretrained import preprocess
    from dattrain.pretrained.weights import load_model
    from dattrain.visualize import draw, html, sampling_points

    if not all(0 <= part <= 1 for part in args.query):
        raise UserError(f"--query {args.query[0]} {args.query[1]}: fractions of the image, from 0 to 1")
    files = preprocess.find(args.images)
    model, cfg = load_model(
        args.checkpoint, ema=args.ema, device=args.device, img_size=preprocess.image_size(args.img_size)
    )
    args.out.mkdir(parents=True, exist_ok=True)
    views = []
    for name, file in zip(unique_names(files), files):
        image = preprocess.prepare(preprocess.read(file), cfg)
        blocks = look(model, image, cfg, device=args.device)
        chosen = sampling_points.select(blocks, stage=args.stage, block=args.block, every=args.every)
        title = f"{file.name}: {args.kind} of {cfg.name} ({cfg.source})" if cfg.source else file.name
        figure = draw.sheet(args.kind, preprocess.array(image), chosen, tuple(args.query), title)
        target = args.out / f"{name}.{args.kind}.png"
        figure.savefig(target)
        print(target)
        views.append(html.View(file.name, preprocess.array(image), chosen))
    target = args.out / f"{args.kind}.html"
    target.write_text(
        html.render(views, title=f"{cfg.name}: {args.kind}", kind=args.kind, query=tuple(args.query)),
        encoding="utf-8",
    )
    print(target)
    return 0


def draw_points(
    model: nn.Module,
    image: np.ndarray | Tensor,
    *,
    meta: PretrainedCfg,
    axis: Axes,
    stage: int | None = None,
    block: int | None = None,
    group: int | None = None,
    area: float = 16.0,
) -> None:
    """Draw an image with its deformed sampling points on ``axis``, point size by the attention received.

    Args:
        model: as ``load_model`` gives it.
        image: uint8, H x W, H x W x 3, or a tensor 3 x H x W; prepared for the model as ``meta`` says.
        stage: from 1; None takes the first stage with deformable attention and at least two offset groups, else the first
            with any (the paper draws its third).
        block: of the stage, from 0; None takes the stage's last deformable block.
        group: from 1; None draws all, each in its colour.
        area: mean area of a point, in square typographic points.

    Raises:
        UserError: the model has no such block or group.
    """
    from dattrain.pretrained import preprocess
    from dattrain.visualize import draw, sampling_points

    pixels = preprocess.from_array(image) if not hasattr(image, "detach") else image
    prepared = preprocess.prepare(pixels, meta)  # type: ignore[arg-type]
    blocks = look(model, prepared, meta, device=next(model.parameters()).device)
    if stage is None:
        stage = next((b.stage for b in blocks if b.groups > 1), blocks[0].stage)
    chosen = sampling_points.select(blocks, stage=stage, block=block)[-1]
    if group is not None and not 1 <= group <= chosen.groups:
        raise UserError(f"group {group}: stage {stage} has groups 1 to {chosen.groups}")
    groups = None if group is None else [group - 1]
    draw.points(axis, preprocess.array(prepared), chosen, groups, area=area)


def look(model: nn.Module, image: Tensor, cfg: PretrainedCfg, *, device: object = "cpu") -> list[Deformed]:
    """Positions and attention of every deformable block for one prepared image (3 x H x W uint8)."""
    from dattrain.pretrained import preprocess
    from dattrain.visualize import sampling_points

    batch = preprocess.normalise(image[None], cfg, device)  # type: ignore[arg-type]
    return sampling_points.capture(model, batch, attention=True)[0]


def unique_names(files: list[Path]) -> list[str]:
    """A file-name stem per image; images of the same name in several folders are numbered."""
    names: list[str] = []
    for file in files:
        candidates = (file.stem if n == 1 else f"{file.stem}_{n}" for n in count(1))
        names.append(next(name for name in candidates if name not in names))
    return names
