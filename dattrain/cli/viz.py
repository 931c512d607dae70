"""``dattrain viz points|offsets|attention``: where a model's deformable attention looks, drawn on images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from dattrain.cli.loading import loading
from dattrain.data.classes import canonical
from dattrain.errors import UserError
from dattrain.text import one_line

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("points", "offsets", "attention")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "kind", choices=KINDS, help="sampling points, their shifts, or the keys that a query reads"
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="RUN|CHECKPOINT|FILE",
        help="whose attention to draw, as for dattrain eval",
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
    """Draw one PNG per image, and one HTML page of them all where blocks, groups and queries (not of a detector) can be chosen.

    An image that cannot be read is an error, after the others are done.
    """
    with loading("torch"):
        from dattrain.models.dense.detector import Detector
        from dattrain.pretrained import class_names, preprocess
        from dattrain.pretrained.detect import detect
        from dattrain.pretrained.weights import load_model
        from dattrain.visualize import draw, html, sampling_points
        from dattrain.visualize.draw_points import attended_image, capture_with_logits
        from dattrain.visualize.picture import picture_of

    if not all(0 <= part <= 1 for part in args.query):
        raise UserError(f"--query {args.query[0]} {args.query[1]}: fractions of the image, from 0 to 1")
    if args.out.suffix.lower() in (".png", ".jpg", ".pdf", ".svg", ".html") or args.out.is_file():
        raise UserError(
            f"--out {args.out}: must be a folder, for a picture of each image and a page of all", exit_code=2
        )
    model, cfg = load_model(
        args.checkpoint, ema=args.ema, device=args.device, img_size=preprocess.image_size(args.img_size)
    )
    files = preprocess.find(args.images)
    args.out.mkdir(parents=True, exist_ok=True)
    classes = class_names.names(cfg.num_classes, cfg.labels, cfg.classes)
    views, bad = [], []
    for name, file in zip(unique_names(files), files):
        try:
            pixels = preprocess.read(file, upright=cfg.sides is not None)
        except UserError as error:
            bad.append(str(error))
            continue
        prepared, picture = preprocess.prepare(pixels, cfg), picture_of(pixels, cfg)
        if isinstance(model, Detector):
            query = tuple(args.query) if args.kind == "attention" else None
            blocks = attended_image(model, prepared, cfg, query=query, device=args.device)
            (found,) = detect(model, cfg, [pixels], names=classes)
            said = found.counts()
        else:
            blocks, logits = capture_with_logits(model, prepared, cfg, device=args.device)
            said = covered(logits, classes) if cfg.segmentation else caption(file, logits.softmax(0), classes)
        chosen = sampling_points.select(blocks, stage=args.stage, block=args.block, every=args.every)
        title = one_line(
            f"{file.name}: {args.kind} of {cfg.name} ({cfg.source})" if cfg.source else file.name
        )
        title = "\n".join(filter(None, (title, said)))
        figure = draw.sheet(args.kind, picture, chosen, tuple(args.query), title)
        target = args.out / f"{name}.{args.kind}.png"
        figure.savefig(target)
        print(f"{target}  {said}".rstrip())
        views.append(html.View(file.name, picture, chosen, said))
    # A page of a detector's attention would need that of every query, gigabytes of it.
    if views and not (cfg.detection is not None and args.kind == "attention"):
        target = args.out / f"{args.kind}.html"
        target.write_text(
            html.render(views, title=f"{cfg.name}: {args.kind}", kind=args.kind, query=tuple(args.query)),
            encoding="utf-8",
        )
        print(target)
    if bad:
        raise UserError("; ".join(bad))
    return 0


def covered(logits: Tensor, classes: Sequence[str]) -> str:
    """The largest classes that a segmentation network (logits K x h x w) finds in an image."""
    shares = logits.argmax(0).reshape(-1).bincount(minlength=len(classes)) / logits[0].numel()
    best = shares.topk(min(3, len(classes)))
    return ", ".join(
        f"{classes[number]} {100 * share:.1f} %"
        for share, number in zip(best.values.tolist(), best.indices.tolist())
        if share
    )


def caption(file: Path, probabilities: Tensor, classes: Sequence[str]) -> str:
    """What the network takes an image for, and its label where it lies in a folder that is called like a class."""
    if not len(probabilities):
        return ""
    best = int(probabilities.argmax())
    said = f"predicted {classes[best]}, {100 * float(probabilities[best]):.1f} %"
    folder = canonical(file.absolute().parent.name)
    label = next((number for number, name in enumerate(classes) if canonical(name) == folder), None)
    if label is None:
        return said
    verdict = (
        "right" if label == best else f"wrong; {100 * float(probabilities[label]):.1f} % {classes[label]}"
    )
    return f"label {classes[label]}, {said} ({verdict})"


def unique_names(files: Sequence[Path]) -> list[str]:
    """A file-name stem per image; images of the same name in several folders are numbered."""
    names: list[str] = []
    for file in files:
        candidates = (file.stem if n == 1 else f"{file.stem}_{n}" for n in count(1))
        names.append(next(name for name in candidates if name not in names))
    return names
