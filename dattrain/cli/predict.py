"""``dattrain predict IMAGES...``: the most likely classes of images, with their names."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from dattrain.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--checkpoint", required=True, metavar="RUN|CHECKPOINT|FILE")
    parser.add_argument("--topk", type=int, default=5, metavar="K", help="classes per image (default: 5)")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="write a row per image and class; - for stdout"
    )
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="class names, one a line, in the order of the head"
    )
    parser.add_argument(
        "--img-size", type=int, nargs="+", metavar="N", help="another size: N, or HEIGHT WIDTH"
    )
    parser.add_argument(
        "--resize", choices=("shorter", "squash"), help="how images are resized (default: as trained)"
    )
    parser.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, help="averaged weights (default: where there are any)"
    )
    parser.add_argument("--batch", type=int, default=16, help="images at a time (default: 16)")
    parser.add_argument("--device", default="cpu")


def run(args: argparse.Namespace) -> int:
    """Print a block per image, or write CSV. An image that cannot be read is an error, after the others are done."""
    from dataclasses import replace

    import torch

    from dattrain.cli.viz import image_size
    from dattrain.pretrained import class_names, preprocess
    from dattrain.pretrained.weights import load_model

    if args.topk < 1 or args.batch < 1:
        raise UserError(f"--topk {args.topk} and --batch {args.batch} must be at least 1", exit_code=2)
    files = preprocess.find(args.images)
    model, card = load_model(
        args.checkpoint, ema=args.ema, device=args.device, img_size=image_size(args.img_size)
    )
    if not card.num_classes:
        raise UserError(f"{args.checkpoint}: has no classification head, so it knows no classes")
    if args.resize:
        card = replace(card, resize=args.resize)
    names = read_names(args.classes, card.num_classes) if args.classes else None
    names = names or class_names.names(card.num_classes, card.labels, card.classes)
    table = csv.writer(sys.stdout) if args.csv == Path("-") else None
    opened = None
    if args.csv and table is None:
        opened = open(args.csv, "w", newline="", encoding="utf-8")  # noqa: SIM115 (closed below)
        table = csv.writer(opened)
    bad: list[str] = []
    try:
        if table:
            table.writerow(["image", "rank", "class", "name", "probability"])
        for first in range(0, len(files), args.batch):
            batch = []
            for file in files[first : first + args.batch]:
                try:
                    batch.append((file, preprocess.prepare(preprocess.read(file), card)))
                except UserError as error:
                    bad.append(str(error))
            if not batch:
                continue
            images = preprocess.normalise(torch.stack([image for _, image in batch]), card, args.device)
            with torch.inference_mode():
                best = model(images).float().softmax(1).topk(min(args.topk, card.num_classes))
            for (file, _), values, indices in zip(batch, best.values.tolist(), best.indices.tolist()):
                if args.csv != Path("-"):
                    print(file)
                for rank, (value, index) in enumerate(zip(values, indices), 1):
                    if table:
                        table.writerow([file, rank, index, names[index], f"{value:.6f}"])
                    if args.csv != Path("-"):
                        print(f"  {100 * value:6.2f} %  {names[index]}")
    finally:
        if opened:
            opened.close()
    if bad:
        raise UserError("; ".join(bad))
    return 0


def read_names(file: Path, num_classes: int) -> list[str]:
    """Class names, one a line. Raises UserError when there are not as many as classes."""
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    if len(names) != num_classes:
        raise UserError(f"{file}: {len(names)} names, but the model has {num_classes} classes")
    return names
