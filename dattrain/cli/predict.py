"""``dattrain predict IMAGES...``: the most likely classes of images, by a segmentation network the class of every pixel, by a detector the objects."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dattrain.cli import outputs
from dattrain.cli.loading import loading
from dattrain.cli.outputs import rows, to_stdout
from dattrain.errors import ConfigError, UserError

if TYPE_CHECKING:
    from dattrain.models.dat import DAT
    from dattrain.models.dense.segmenter import Segmenter
    from dattrain.pretrained.pretrained_cfg import PretrainedCfg

BATCH = 16
OUT = Path("predictions")
LISTED = 5
HEAD = ("image", "rank", "class", "name")
"""Columns of a CSV; the last is of the task."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="RUN|CHECKPOINT|FILE",
        help="whose weights, as for dattrain eval",
    )
    parser.add_argument(
        "--topk",
        type=int,
        metavar="K",
        help=f"classes per image (default: {LISTED}); detection: objects per image at most",
    )
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="write a row per image and class, or object; - for stdout"
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
    parser.add_argument("--batch", type=int, help=f"images at a time (default: {BATCH})")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"segmentation, detection: folder for a picture of each image with what was found (default: {OUT})",
    )
    parser.add_argument(
        "--maps",
        action="store_true",
        help="segmentation: beside each picture its map, a PNG of the number of every pixel's class",
    )
    parser.add_argument(
        "--score",
        type=float,
        metavar="S",
        help="detection: least score of an object, 0 to 1 (default: 0.3)",
    )
    parser.add_argument(
        "--points",
        action="store_true",
        help="detection: beside each picture one of the sampling points of stages 3 and 4 over it (the paper's Figure 4)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="detection: all objects in COCO's format, with scores: a start for annotating; category ids are those of the run's data.train while it is there, else 1, 2, ...",
    )
    parser.add_argument("--device", default="cpu")


def run(args: argparse.Namespace) -> int:
    """Print a block per image, or write CSV. An image that cannot be read is an error, after the others are done."""
    with loading("torch"):
        from dattrain.models.dense.detector import Detector
        from dattrain.models.dense.segmenter import Segmenter
        from dattrain.pretrained import class_names, preprocess
        from dattrain.pretrained.weights import load_model

    for option, value in (("--topk", args.topk), ("--batch", args.batch)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value} must be at least 1", exit_code=2)
    outputs.check_file("--csv", None if to_stdout(args.csv) else args.csv)
    outputs.check_file("--json", args.json)
    outputs.check_folder("--out", args.out)
    size = preprocess.image_size(args.img_size)
    model, cfg = load_model(args.checkpoint, ema=args.ema, device=args.device, img_size=size)
    files = preprocess.find(args.images)
    names = class_names.read(args.classes, cfg.num_classes) if args.classes else None
    _check_options(args, cfg)
    if isinstance(model, Segmenter):
        bad = _segment(args, model, cfg, files, names)
    elif isinstance(model, Detector):
        from dattrain.cli.predict_objects import detect_all

        bad = detect_all(args, model, cfg, files, names, out=args.out or OUT, listed=args.topk or LISTED)
    else:
        bad = _classify(args, model, cfg, files, names)
    if bad:
        raise UserError("; ".join(dict.fromkeys(bad)))
    return 0


def _check_options(args: argparse.Namespace, cfg: PretrainedCfg) -> None:
    """Raise ConfigError for what only other tasks know."""
    from dattrain.pretrained.pretrained_cfg import NETWORKS

    of = {
        "--resize": ("classification",),
        "--batch": ("classification",),
        "--out": ("segmentation", "detection"),
        "--maps": ("segmentation",),
        "--score": ("detection",),
        "--points": ("detection",),
        "--json": ("detection",),
    }
    for name, tasks in of.items():
        given = getattr(args, name[2:])
        if given is not None and given is not False and cfg.task not in tasks:
            raise ConfigError(
                f"{args.checkpoint}: is {NETWORKS[cfg.task]}, for which {name} has no meaning: leave it out"
            )


def _classify(
    args: argparse.Namespace, model: DAT, cfg: PretrainedCfg, files: Sequence[Path], names: list[str] | None
) -> list[str]:
    """Returns what was wrong with images."""
    from dataclasses import replace

    from dattrain.pretrained import preprocess
    from dattrain.pretrained.predict import predict

    if not cfg.num_classes:
        raise UserError(f"{args.checkpoint}: has no classification head, so it knows no classes")
    if args.resize:
        cfg = replace(cfg, resize=args.resize)
    batch, bad = args.batch or BATCH, []
    with rows(args.csv, [*HEAD, "probability"]) as table:
        for first in range(0, len(files), batch):
            read = []
            for file in files[first : first + batch]:
                try:
                    read.append((file, preprocess.read(file)))
                except UserError as error:
                    bad.append(str(error))
            found = predict(
                model, cfg, [image for _, image in read], topk=args.topk or LISTED, batch=batch, names=names
            )
            for (file, _), best in zip(read, found):
                if not to_stdout(args.csv):
                    print(file)
                for rank, each in enumerate(best, 1):
                    table.writerow([file, rank, each.number, each.name, f"{each.probability:.6f}"])
                    if not to_stdout(args.csv):
                        print(f"  {100 * each.probability:6.2f} %  {each.name}")
    return bad


def _segment(
    args: argparse.Namespace,
    model: Segmenter,
    cfg: PretrainedCfg,
    files: Sequence[Path],
    names: list[str] | None,
) -> list[str]:
    """Returns what was wrong with images."""
    from PIL import Image

    from dattrain.cli import own_pictures
    from dattrain.pretrained.segment import segment
    from dattrain.visualize.legend import with_legend

    out: Path = args.out or OUT
    stems = own_pictures.names(out, files, (".png", ".map.png") if args.maps else (".png",))
    topk = args.topk or LISTED
    bad = []
    with rows(args.csv, [*HEAD, "share"]) as table:
        for stem, file in zip(stems, files):
            try:
                (found,) = segment(model, cfg, [file], names=names)
            except UserError as error:
                bad.append(str(error))
                continue
            target = out / f"{stem}.png"
            own_pictures.save(target, with_legend(found))
            if args.maps:
                own_pictures.save(out / f"{stem}.map.png", Image.fromarray(found.classes))
            shares = found.shares()
            if not to_stdout(args.csv):
                print(f"{file} -> {target}")
            for rank, each in enumerate(shares[:topk], 1):
                table.writerow([file, rank, each.number, each.name, f"{each.share:.6f}"])
                if not to_stdout(args.csv):
                    print(f"  {100 * each.share:6.2f} %  {each.name}")
            if len(shares) > topk and not to_stdout(args.csv):
                rest = sum(each.share for each in shares[topk:])
                print(f"  {100 * rest:6.2f} %  {len(shares) - topk} more")
    return bad
