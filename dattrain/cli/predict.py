"""``dattrain predict IMAGES...``: the most likely classes of images, or by a segmentation network the class of every pixel."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dattrain.cli import outputs
from dattrain.cli.loading import loading
from dattrain.errors import ConfigError, UserError

if TYPE_CHECKING:
    from dattrain.models.dat import DAT
    from dattrain.models.dense.segmenter import Segmenter
    from dattrain.pretrained.pretrained_cfg import PretrainedCfg

BATCH = 16
OUT = Path("predictions")
LISTED = 5


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
        "--topk", type=int, default=LISTED, metavar="K", help=f"classes per image (default: {LISTED})"
    )
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
    parser.add_argument("--batch", type=int, help=f"images at a time (default: {BATCH})")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"segmentation: folder for a coloured picture of each image (default: {OUT})",
    )
    parser.add_argument(
        "--maps",
        action="store_true",
        help="segmentation: beside each picture its map, a PNG of the number of every pixel's class",
    )
    parser.add_argument("--device", default="cpu")


def run(args: argparse.Namespace) -> int:
    """Print a block per image, or write CSV. An image that cannot be read is an error, after the others are done."""
    with loading("torch"):
        from dattrain.models.dense.segmenter import Segmenter
        from dattrain.pretrained import class_names, preprocess
        from dattrain.pretrained.weights import load_model

    for option, value in (("--topk", args.topk), ("--batch", args.batch)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value} must be at least 1", exit_code=2)
    outputs.check_file("--csv", None if _to_stdout(args.csv) else args.csv)
    outputs.check_folder("--out", args.out)
    size = preprocess.image_size(args.img_size)
    model, cfg = load_model(args.checkpoint, ema=args.ema, device=args.device, img_size=size)
    files = preprocess.find(args.images)
    names = class_names.read(args.classes, cfg.num_classes) if args.classes else None
    _check_options(args, segmentation=cfg.segmentation is not None)
    if isinstance(model, Segmenter):
        bad = _segment(args, model, cfg, files, names)
    else:
        bad = _classify(args, model, cfg, files, names)
    if bad:
        raise UserError("; ".join(bad))
    return 0


def _check_options(args: argparse.Namespace, *, segmentation: bool) -> None:
    """Raise ConfigError for what only the other task knows."""
    given = {
        True: {"--resize": args.resize, "--batch": args.batch},
        False: {"--out": args.out, "--maps": args.maps},
    }[segmentation]
    kind = "a segmentation network" if segmentation else "an image classifier"
    for name, value in given.items():
        if value:
            raise ConfigError(f"{args.checkpoint}: is {kind}, for which {name} has no meaning: leave it out")


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
    with _table(args.csv, "probability") as table:
        for first in range(0, len(files), batch):
            read = []
            for file in files[first : first + batch]:
                try:
                    read.append((file, preprocess.read(file)))
                except UserError as error:
                    bad.append(str(error))
            found = predict(
                model, cfg, [image for _, image in read], topk=args.topk, batch=batch, names=names
            )
            for (file, _), best in zip(read, found):
                if not _to_stdout(args.csv):
                    print(file)
                for rank, each in enumerate(best, 1):
                    table.writerow([file, rank, each.number, each.name, f"{each.probability:.6f}"])
                    if not _to_stdout(args.csv):
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
    from PIL.PngImagePlugin import PngInfo

    from dattrain.cli.viz import unique_names
    from dattrain.pretrained.segment import segment
    from dattrain.visualize.legend import with_legend

    out: Path = args.out or OUT
    stems = unique_names(files)
    targets = [
        out / f"{stem}{end}" for stem in stems for end in ((".png", ".map.png") if args.maps else (".png",))
    ]
    if foreign := next((each for each in targets if each.exists() and not _is_ours(each)), None):
        raise UserError(
            f"--out {out}: {foreign} is there, and predict did not write it; name another folder", exit_code=2
        )
    if again := next((file for file in files if _is_ours(file)), None):
        raise UserError(
            f"{again}: is a picture that predict wrote; name the pictures that it was made of", exit_code=2
        )
    mark = PngInfo()
    mark.add_text("Software", _SOFTWARE)
    bad = []
    with _table(args.csv, "share") as table:
        for stem, file in zip(stems, files):
            try:
                (found,) = segment(model, cfg, [file], names=names)
            except UserError as error:
                bad.append(str(error))
                continue
            target = out / f"{stem}.png"
            try:
                out.mkdir(parents=True, exist_ok=True)
                with_legend(found).save(target, pnginfo=mark)
                if args.maps:
                    Image.fromarray(found.classes).save(out / f"{stem}.map.png", pnginfo=mark)
            except OSError as error:
                raise UserError(f"--out {out}: cannot be written ({error.strerror})", exit_code=2) from error
            shares = found.shares()
            if not _to_stdout(args.csv):
                print(f"{file} -> {target}")
            for rank, each in enumerate(shares[: args.topk], 1):
                table.writerow([file, rank, each.number, each.name, f"{each.share:.6f}"])
                if not _to_stdout(args.csv):
                    print(f"  {100 * each.share:6.2f} %  {each.name}")
            if len(shares) > args.topk and not _to_stdout(args.csv):
                rest = sum(each.share for each in shares[args.topk :])
                print(f"  {100 * rest:6.2f} %  {len(shares) - args.topk} more")
    return bad


_SOFTWARE = "dattrain predict"
"""In the pictures, so that they are known from those of others."""


def _is_ours(path: Path) -> bool:
    """Whether ``predict`` wrote a file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.info.get("Software") == _SOFTWARE
    except (OSError, ValueError, Image.DecompressionBombError):
        return False


def _to_stdout(path: Path | None) -> bool:
    return path == Path("-")


class _Nowhere:
    def writerow(self, row: Sequence[object]) -> None:
        """Not asked for."""


@contextmanager
def _table(path: Path | None, value: str) -> Iterator[Any]:
    """What takes rows of (image, rank, class, name, ``value``): a CSV at ``path``, or nothing."""
    head = ["image", "rank", "class", "name", value]
    if path is None:
        yield _Nowhere()
    elif _to_stdout(path):
        table = csv.writer(sys.stdout)
        table.writerow(head)
        yield table
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(head)
            yield table
