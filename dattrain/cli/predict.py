"""``dattrain predict IMAGES...``: the most likely classes of images, with their names."""

from __future__ import annotations

import argparse
import csv
import sys
from contextlib import ExitStack
from pathlib import Path

from dattrain.cli.loading import loading
from dattrain.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="RUN|CHECKPOINT|FILE",
        help="whose weights, as for dattrain eval",
    )
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

    with loading("torch"):
        from dattrain.pretrained import class_names, preprocess
        from dattrain.pretrained.predict import predict
        from dattrain.pretrained.weights import load_model

    if args.topk < 1 or args.batch < 1:
        raise UserError(f"--topk {args.topk} and --batch {args.batch} must be at least 1", exit_code=2)
    model, cfg = load_model(
        args.checkpoint, ema=args.ema, device=args.device, img_size=preprocess.image_size(args.img_size)
    )
    files = preprocess.find(args.images)
    if not cfg.num_classes:
        raise UserError(f"{args.checkpoint}: has no classification head, so it knows no classes")
    if args.resize:
        cfg = replace(cfg, resize=args.resize)
    names = class_names.read(args.classes, cfg.num_classes) if args.classes else None
    to_stdout = args.csv == Path("-")
    bad: list[str] = []
    with ExitStack() as stack:
        table = csv.writer(sys.stdout) if to_stdout else None
        if args.csv and not to_stdout:
            table = csv.writer(stack.enter_context(open(args.csv, "w", newline="", encoding="utf-8")))
        if table:
            table.writerow(["image", "rank", "class", "name", "probability"])
        for first in range(0, len(files), args.batch):
            read = []
            for file in files[first : first + args.batch]:
                try:
                    read.append((file, preprocess.read(file)))
                except UserError as error:
                    bad.append(str(error))
            predictions = predict(
                model, cfg, [image for _, image in read], topk=args.topk, batch=args.batch, names=names
            )
            for (file, _), best in zip(read, predictions):
                if not to_stdout:
                    print(file)
                for rank, found in enumerate(best, 1):
                    if table:
                        table.writerow([file, rank, found.number, found.name, f"{found.probability:.6f}"])
                    if not to_stdout:
                        print(f"  {100 * found.probability:6.2f} %  {found.name}")
    if bad:
        raise UserError("; ".join(bad))
    return 0
