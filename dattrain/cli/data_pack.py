"""``dattrain data pack``: shards of our own from whatever images are in."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dattrain.cli.arguments import positive
from dattrain.cli.data_output import say, say_left_out
from dattrain.errors import UserError
from dattrain.files import counted, readable_size
from dattrain.runtime.progress import Progress

if TYPE_CHECKING:
    from dattrain.data.source.dataset import Dataset
    from dattrain.data.source.index import LeftOut


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Arguments of the action."""
    p.add_argument(
        "source",
        metavar="SRC",
        help="image folder, list file (path, label), IDX file, .npz, shards, or ImageNet's tars of a class each",
    )
    out = p.add_argument("out", metavar="OUT", help="folder of the shards")
    annotated = p.add_mutually_exclusive_group()
    for name, metavar, what in (
        ("--ade", "DIR", "ADE20K (images/training and annotations/training, by --split)"),
        ("--coco", "JSON", "objects in COCO's form"),
        (
            "--voc",
            "DIR",
            "PASCAL VOC (ImageSets/Segmentation/train.txt, else Main/train.txt, by --split), or a list of it",
        ),
    ):
        annotated.add_argument(
            name, metavar=metavar, action=_InsteadOfSource, out=out, help=f"instead of SRC: {what}"
        )
    p.add_argument("--images", metavar="DIR", help="of --coco: where its images are (default: beside it)")
    p.add_argument("--labels", metavar="FILE", help="IDX file of labels (default: beside the images)")
    p.add_argument(
        "--label-set",
        metavar="SET",
        help="number synset folders as this set of data.labels (imagenet-22k, ...)",
    )
    p.add_argument(
        "--label", metavar="FIELD", help="of shards: field of .json with the label (default: their index's)"
    )
    p.add_argument("--root", metavar="DIR", help="where a list file's paths begin (default: its own folder)")
    p.add_argument(
        "--split",
        metavar="NAME",
        help="prefix of the shards (default: train; of --coco and of a list of --voc: what the name says)",
    )
    p.add_argument(
        "--holdout", type=int, default=0, metavar="N", help="samples that go to another split, by the seed"
    )
    p.add_argument("--holdout-split", default="val", metavar="NAME", help="its prefix (default: val)")
    p.add_argument(
        "--per-shard", type=positive, default=4096, metavar="N", help="samples per shard (default: 4096)"
    )
    p.add_argument("--seed", type=int, default=0, help="of the shuffle (default: 0)")
    p.add_argument("--no-shuffle", action="store_true", help="keep the order of the source")
    p.add_argument("--resize", type=positive, metavar="PX", help="shrink larger images to this shorter side")
    p.add_argument("--format", choices=("jpg", "png", "webp"), help="encode every image anew")
    p.add_argument("--quality", type=positive, default=92, help="of jpg and webp (default: 92)")
    p.add_argument("--dedup", action="store_true", help="keep the first of the images with equal bytes")
    p.add_argument(
        "--drop-empty",
        action="store_true",
        help="of objects: leave out images without any, and with a side below 32 pixels, as recipes of detection do in training",
    )
    p.add_argument(
        "--no-check", action="store_true", help="read the headers of images, but do not decode them"
    )
    p.add_argument(
        "--on-bad", choices=("error", "skip"), default="error", help="skip leaves bad images out, by name"
    )


def _classes(manifest: Mapping[str, Any]) -> str:
    """How many a packed split has samples of, and of how many that have a name."""
    there, named, more = len(manifest["histogram"]), len(manifest["classes"] or ()), ""
    if manifest.get("annotations") and not named:
        more = " without names"
    elif manifest.get("annotations") == "instances":
        there, named, more = there - 1, named - 1, " and the background"
    return (f"{there:,} of {counted(named, 'class')}" if named > there else counted(there, "class")) + more


def _dropped(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """What ``--drop-empty`` left out, counted by reason, with the first of each."""
    from dattrain.data.classes import few

    by_reason: dict[str, list[str]] = {}
    for row in rows:
        by_reason.setdefault(row["reason"], []).append(row["key"])
    return [
        f"{counted(len(keys), 'image')} left out, with {reason}: {few(keys)}"
        for reason, keys in by_reason.items()
    ]


def run(args: argparse.Namespace) -> int:
    """Exit code 0; 1 where an image or label of the source is lost."""
    from dattrain.data.prepare.pack import pack
    from dattrain.data.prepare.write_shard import PackOptions
    from dattrain.data.source.dataset import ShardDataset
    from dattrain.data.source.fields import Relabelled

    source, split = _source(args)
    options = PackOptions(
        split=split,
        holdout=args.holdout,
        holdout_split=args.holdout_split,
        per_shard=args.per_shard,
        seed=None if args.no_shuffle else args.seed,
        resize=args.resize,
        format=args.format,
        quality=args.quality,
        check=not args.no_check,
        dedup=args.dedup,
        drop_empty=args.drop_empty,
        skip_bad=args.on_bad == "skip",
        label_set=args.label_set,
        label=args.label,
    )
    say(source)
    with Progress("packing") as progress:
        manifests = pack(source, args.out, options, jobs=args.jobs, progress=progress)
    for m in manifests:
        shards, bad = m["shards"], m["bad"]
        print(
            f"{args.out}/{m['split']}-*.tar: {counted(m['samples'], 'sample')} in {counted(len(shards), 'shard')}, {readable_size(m['bytes'])}, "
            f"{_classes(m)}" + (f", {m['annotations']}" if m.get("annotations") else "")
        )
        for line in m.get("contents", ()):
            print(f"{m['split']}: {line}", file=sys.stderr)
        for line in _dropped(m.get("dropped", ())):
            print(f"{m['split']}: {line}; named in {args.out}/_{m['split']}.manifest.json", file=sys.stderr)
        for entry in bad:
            print(f"left out: {entry['reason']}", file=sys.stderr)
    duplicates = Path(args.out, "_duplicates.json")
    if args.dedup:
        found = json.loads(duplicates.read_bytes())
        differ = sum(not row["same_label"] for row in found)
        print(f"{len(found):,} duplicates left out, {differ:,} of them with another label; see {duplicates}")
    shards = source.source if isinstance(source, Relabelled) else source
    left_out: list[LeftOut] = []
    if isinstance(shards, ShardDataset):
        left_out = [some for i in range(len(shards.counts)) for some in shards.index(i).left_out]
    return 1 if say_left_out(left_out) else 0


def _source(args: argparse.Namespace) -> tuple[Dataset, str]:
    """What is to be packed, and the prefix of its shards."""
    from dattrain.data.prepare.sources import open_annotated, open_source

    given = [name for name in ("ade", "coco", "voc") if getattr(args, name) is not None]
    if given and args.out is not None:
        raise UserError(
            f"both SRC ({args.source}) and --{given[0]} say what to pack; `dattrain data pack --{given[0]} ... OUT` packs one",
            exit_code=2,
        )
    if given:
        args.out = args.source
    if args.images is not None and args.coco is None:
        raise UserError(f"--images {args.images}: goes with --coco alone", exit_code=2)
    if given:
        return open_annotated(given[0], getattr(args, given[0]), split=args.split, images=args.images)
    source = open_source(
        args.source,
        labels=args.labels,
        root=args.root,
        label=args.label,
        cache_dir=args.cache_dir,
        jobs=args.jobs,
    )
    return source, args.split or "train"


class _InsteadOfSource(argparse.Action):
    """An option that says what to pack: one positional argument is then enough, and is OUT."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, *, out: argparse.Action, **kwargs: Any
    ) -> None:
        super().__init__(option_strings, dest, **kwargs)
        self.out = out

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Take the value. ``argparse`` looks for what is required when all is read."""
        setattr(namespace, self.dest, values)
        self.out.required = False
