"""``dattrain predict`` by a detector: pictures of what was found, tables of it, and where the network looked."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dattrain.cli import own_pictures
from dattrain.cli.outputs import rows, to_stdout
from dattrain.errors import UserError
from dattrain.text import one_line
from dattrain.urls import mask

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from dattrain.models.dense.detector import Detector
    from dattrain.pretrained.detect import Detection
    from dattrain.pretrained.pretrained_cfg import PretrainedCfg

HEAD = ("image", "rank", "class", "name", "score", "left", "top", "right", "bottom")
"""Columns of the CSV; edges are in pixels."""


def detect_all(
    args: argparse.Namespace,
    model: Detector,
    cfg: PretrainedCfg,
    files: Sequence[Path],
    names: Sequence[str] | None,
    *,
    out: Path,
    listed: int,
) -> list[str]:
    """Print a block per image and write what was asked for; returns what was wrong with images.

    Args:
        out: the folder of the pictures.
        listed: objects of an image that are printed at most.

    Raises:
        UserError: something cannot be written, or there are no points to draw.
        ConfigError: a score that is none.
    """
    from PIL import Image

    from dattrain.pretrained import class_names
    from dattrain.pretrained.detect import check_score, detect
    from dattrain.tasks.detected_images import SCORE
    from dattrain.visualize.detected import LONGEST, sheet

    score = SCORE if args.score is None else args.score
    check_score(score, "--score")
    stems = own_pictures.names(out, files, (".png", ".points.png") if args.points else (".png",))
    known = tuple(names or class_names.names(cfg.num_classes, cfg.labels, cfg.classes))
    bad, quiet = [], to_stdout(args.csv)
    coco = None if args.json is None else _Coco(known, *_ids(args.checkpoint, cfg))
    with rows(args.csv, HEAD) as table:
        for stem, file in zip(stems, files):
            try:
                (found,) = detect(model, cfg, [file], names=known, score_threshold=score)
                found = found.best(args.topk)
                target = out / f"{stem}.png"
                own_pictures.save(target, Image.fromarray(found.overlay(longest=LONGEST)))
                if args.points:
                    figure = sheet(model, cfg, found, one_line(file.name))
                    own_pictures.save(out / f"{stem}.points.png", _image(figure))
            except UserError as error:
                bad.append(str(error))
                continue
            if coco is not None:
                coco.add(file, found)
            objects = found.objects()
            if not quiet:
                print(f"{file} -> {target}  {found.counts() or 'nothing'}")
            for rank, each in enumerate(objects, 1):
                edges = [f"{edge:.2f}" for edge in each.box]
                table.writerow([file, rank, each.number, each.name, f"{each.score:.6f}", *edges])
                if not quiet and rank <= listed:
                    left, top, right, bottom = map(round, each.box)
                    where = f"{right - left} x {bottom - top} at {left}, {top}"
                    print(f"  {100 * each.score:6.2f} %  {each.name}  {where}")
            if not quiet and (more := len(objects) - listed) > 0:
                print(f"            {more} more")
    if coco is not None:
        coco.write(args.json)
        print(f"{args.json}: categories have {coco.numbered}", file=sys.stderr if quiet else sys.stdout)
    return bad


def _ids(checkpoint: str, cfg: PretrainedCfg) -> tuple[Sequence[int], str]:
    """Ids of the categories by class number, and what they are."""
    from dattrain.pretrained import category_ids

    if (known := category_ids.of_training(checkpoint, cfg)) is not None:
        return known[0], f"the ids of data.train={mask(known[1])}"
    why = (
        "its training set is not there to be asked"
        if Path(checkpoint).is_dir()
        else "a weights file does not say others"
    )
    return range(1, cfg.num_classes + 1), f"the ids 1, 2, ... in the order of the classes, since {why}"


class _Coco:
    """What was found, as a set in COCO's format with scores. ``numbered`` says what ``ids``, of the classes by number, are."""

    def __init__(self, names: Sequence[str], ids: Sequence[int], numbered: str) -> None:
        self._ids, self.numbered = ids, numbered
        self._content: dict[str, list[dict[str, Any]]] = {
            "images": [],
            "categories": [{"id": number, "name": name} for number, name in zip(self._ids, names)],
            "annotations": [],
        }

    def add(self, file: Path, found: Detection) -> None:
        images, annotations = self._content["images"], self._content["annotations"]
        height, width = found.pixels.shape[:2]
        images.append({"id": len(images) + 1, "file_name": str(file), "height": height, "width": width})
        areas = found.areas()
        for row, area in zip(found.coco(len(images), self._ids), areas):
            annotations.append({"id": len(annotations) + 1, **row, "area": area, "iscrowd": 0})

    def write(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self._content) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {path}: cannot be written ({error.strerror})", exit_code=2) from error


def _image(figure: Figure) -> Image:
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)
