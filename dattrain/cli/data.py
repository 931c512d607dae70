"""``dattrain data pack|verify|index|ls|stats``: everything about shards that is not training."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dattrain.errors import UserError
from dattrain.files import counted, readable_size
from dattrain.runtime.progress import Progress
from dattrain.urls import mask

if TYPE_CHECKING:
    from dattrain.data.prepare.index_shards import IndexedShard
    from dattrain.data.source.dataset import Dataset
    from dattrain.data.source.index import LeftOut


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    jobs = argparse.ArgumentParser(add_help=False)
    jobs.add_argument(
        "--jobs", type=_positive, default=len(os.sched_getaffinity(0)), metavar="N", help="processes"
    )

    remote = argparse.ArgumentParser(add_help=False)
    remote.add_argument("--cache-dir", metavar="DIR", help="where shards at s3://, https://, ... are kept")

    p = actions.add_parser(
        "pack", parents=[jobs, remote], help="write shuffled WebDataset shards; run it again after a kill"
    )
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
        "--per-shard", type=_positive, default=4096, metavar="N", help="samples per shard (default: 4096)"
    )
    p.add_argument("--seed", type=int, default=0, help="of the shuffle (default: 0)")
    p.add_argument("--no-shuffle", action="store_true", help="keep the order of the source")
    p.add_argument("--resize", type=_positive, metavar="PX", help="shrink larger images to this shorter side")
    p.add_argument("--format", choices=("jpg", "png", "webp"), help="encode every image anew")
    p.add_argument("--quality", type=_positive, default=92, help="of jpg and webp (default: 92)")
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

    v = actions.add_parser(
        "verify", parents=[jobs, remote], help="read every byte, decode every image, name what is bad"
    )
    v.add_argument("data", metavar="DATA", help="shards (folder, file, pattern) or image folder")
    v.add_argument("--classes", type=_positive, metavar="N", help="labels must be below N")

    i = actions.add_parser("index", parents=[jobs], help="index shards that others wrote")
    i.add_argument("data", metavar="DATA", help="shards: folder, file or pattern")
    i.add_argument("--force", action="store_true", help="index anew what has an index")
    i.add_argument("--checksum", action="store_true", help="also compute SHA-256, which reads every byte")
    i.add_argument(
        "--label",
        metavar="FIELD",
        help="field of .json with the label, or the member that holds it, as output.cls (default: .cls, else label)",
    )
    i.add_argument("--image", metavar="EXT", help="the image's member, as input.jpg (default: any image's)")
    i.add_argument(
        "--out",
        metavar="DIR",
        help="write links to the shards, indexes and catalogue there, for a read-only place",
    )
    i.add_argument(
        "--drop", action="store_true", help="shards that are missing are gone for good: forget them"
    )
    i.add_argument("--unterminated", action="store_true", help="accept tars without their end marker")

    n = actions.add_parser("ls", parents=[remote], help="list shards, or the samples of one")
    n.add_argument("data", metavar="DATA", help="shards (folder, file, pattern) or image folder")
    n.add_argument("--samples", action="store_true", help="list every sample: key, label, offset, bytes")

    s = actions.add_parser("stats", parents=[jobs, remote], help="classes and image sizes, with a picture")
    s.add_argument("data", metavar="DATA", help="shards (folder, file, pattern) or image folder")
    s.add_argument(
        "--limit", type=_positive, default=20_000, metavar="N", help="headers to read (default: 20000)"
    )
    s.add_argument("--all", action="store_true", help="read the headers of all images")
    s.add_argument("--out", metavar="FILE", help="picture, .png or .pdf (default: none)")


def run(args: argparse.Namespace) -> int:
    """Exit code 0; ``verify`` gives 1 where something is bad, ``index`` where an image or label is lost."""
    return {"pack": _pack, "verify": _verify, "index": _index, "ls": _ls, "stats": _stats}[args.action](args)


def _classes(manifest: Mapping[str, Any]) -> str:
    """How many a packed split has samples of."""
    there = counted(len(manifest["histogram"]), "class")
    if not manifest["classes"] and manifest.get("annotations"):
        return f"{there} without names"
    if manifest.get("annotations") == "instances":
        return f"{counted(len(manifest['histogram']) - 1, 'class')} and the background"
    return there


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


def _pack(args: argparse.Namespace) -> int:
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
    _say(source)
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
        import json

        found = json.loads(duplicates.read_bytes())
        differ = sum(not row["same_label"] for row in found)
        print(f"{len(found):,} duplicates left out, {differ:,} of them with another label; see {duplicates}")
    shards = source.source if isinstance(source, Relabelled) else source
    left_out: list[LeftOut] = []
    if isinstance(shards, ShardDataset):
        left_out = [some for i in range(len(shards.counts)) for some in shards.index(i).left_out]
    return 1 if _say_left_out(left_out) else 0


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


def _verify(args: argparse.Namespace) -> int:
    from dattrain.data.prepare.contents import ONLY_DETECTION
    from dattrain.data.prepare.verify import verify
    from dattrain.data.source.dataset import open_dataset

    problems: list[str] = []
    dataset = open_dataset(args.data, cache_dir=args.cache_dir, problems=problems)
    _say(dataset)
    with Progress("verifying") as progress:
        report = verify(dataset, jobs=args.jobs, num_classes=args.classes, progress=progress)
    report.damaged[:0] = problems
    for message in report.damaged:
        print(f"damaged: {message}")
    for key, reason in report.bad:
        print(f"bad: {key}: {reason}")
    _say_left_out(report.left_out)
    print(
        f"{mask(args.data)}: {counted(report.samples, 'sample')}, {readable_size(report.nbytes)} decoded; "
        f"{counted(len(report.bad), 'bad sample')}, {counted(len(report.damaged), 'damaged shard')}"
    )
    if dataset.maskless:
        print(f"{mask(args.data)}: {dataset.maskless}; {ONLY_DETECTION}", file=sys.stderr)
    for line in report.objects.oddities():
        print(f"{mask(args.data)}: {line}", file=sys.stderr)
    return 0 if report.good and not dataset.flaws else 1


def _index(args: argparse.Namespace) -> int:
    from dattrain.data.prepare.index_shards import index_shards, link_shards
    from dattrain.data.source import inventory
    from dattrain.data.source.listing import is_remote
    from dattrain.data.source.shards import expand

    if is_remote(args.data):
        raise UserError(
            f"{args.data}: an index is written beside its shards, so run this where they are, or on a copy of them"
        )
    paths = expand(args.data)
    missing = inventory.missing(paths)
    if args.out:
        paths = link_shards(paths, args.out)
    with Progress("indexing", unit="shards") as progress:
        shards = index_shards(
            paths,
            jobs=args.jobs,
            force=args.force,
            checksum=args.checksum,
            image=args.image,
            label=args.label,
            unterminated=args.unterminated,
            drop=args.drop,
            progress=progress,
        )
    samples = sum(shard.entry.samples for shard in shards)
    print(f"{args.out or args.data}: {counted(samples, 'sample')} in {counted(len(shards), 'shard')} indexed")
    for what, keys in (
        ("samples have no image", [f"{s.path}: {key}" for s in shards for key in s.no_image]),
        ("samples have no label", [f"{s.path}: {key}" for s in shards for key in s.no_label]),
        ("samples have no annotation", [f"{s.path}: {key}" for s in shards for key in s.no_annotation]),
        ("shards have no samples", [s.path for s in shards if not s.entry.samples]),
        ("shards are missing between others", inventory.gaps(paths)),
        ("missing shards dropped from the catalogue", missing if args.drop else []),
    ):
        if keys:
            more = f", and {len(keys) - 10:,} more" if len(keys) > 10 else ""
            print(f"{len(keys):,} {what}: {', '.join(keys[:10])}{more}", file=sys.stderr)
    lost = _say_left_out([some for shard in shards for some in shard.left_out])
    _warn_of_order(shards)
    if missing and not args.drop:
        raise UserError(inventory.missing_message(missing, where=args.out))
    return 1 if lost else 0


def _say_left_out(left_out: list[LeftOut]) -> bool:
    """Count by kind what no sample has; returns whether something is lost by it."""
    from dattrain.data.source.build_index import describe

    if left_out:
        total = sum(some.count for some in left_out)
        print(f"{total:,} members left out: {describe(left_out)}", file=sys.stderr)
    return any(some.lost for some in left_out)


def _warn_of_order(shards: list[IndexedShard]) -> None:
    if not shards:
        return
    labels = max(shard.entry.max_label for shard in shards) + 1
    together = sum(shard.together for shard in shards) / len(shards)
    if labels > 10 and together > 0.5:
        print(
            f"{together:.0%} of neighbouring samples have the same label: these shards were written class by class, which "
            "shuffle windows cannot undo; pack them anew with `dattrain data pack` before training",
            file=sys.stderr,
        )


def _ls(args: argparse.Namespace) -> int:
    from dattrain.data.source.dataset import ShardDataset, open_dataset

    dataset = open_dataset(args.data, cache_dir=args.cache_dir)
    _say(dataset)
    if args.samples:
        for shard, count in enumerate(dataset.counts.tolist()):
            for i in range(count):
                place = ""
                if isinstance(dataset, ShardDataset):
                    index = dataset.index(shard)
                    place = f"\t{index.offsets[i]}\t{index.lengths[i]}"
                print(f"{dataset.key(shard, i)}\t{dataset.label(shard, i)}{place}")
        return 0
    if isinstance(dataset, ShardDataset):
        for path, count, size in zip(
            dataset.shards.paths, dataset.counts.tolist(), dataset.shards.sizes.tolist()
        ):
            print(f"{path}\t{count}\t{size}")
        total = f", {readable_size(int(dataset.shards.sizes.sum()))}"
    else:
        total = _per_class(dataset)
    print(
        f"{counted(int(dataset.counts.sum()), 'sample')} in {counted(len(dataset.counts), 'shard')}{total}",
        file=sys.stderr,
    )
    return 0


def _per_class(dataset: Dataset) -> str:
    names = dataset.classes or ()
    if dataset.annotations != "none":
        print("\n".join(names))
        return f", {len(names):,} classes, {dataset.annotations}"
    counts = [0] * len(names)
    for i in range(int(dataset.counts[0])):
        counts[dataset.label(0, i)] += 1
    for name, count in zip(names, counts):
        print(f"{name}\t{count}")
    return f", {len(names):,} classes"


def _stats(args: argparse.Namespace) -> int:
    from dattrain.data.prepare.stats import draw, measure
    from dattrain.data.source.dataset import open_dataset

    if args.out and os.path.splitext(args.out)[1] not in (".png", ".pdf", ".svg"):
        raise UserError(f"--out {args.out}: the picture is a .png, .pdf or .svg file", exit_code=2)
    dataset = open_dataset(args.data, cache_dir=args.cache_dir)
    _say(dataset)
    with Progress("reading headers") as progress:
        stats = measure(dataset, limit=None if args.all else args.limit, jobs=args.jobs, progress=progress)
    print("\n".join(stats.lines()))
    if args.out:
        draw(stats, args.out)
        print(f"picture      {args.out}")
    return 0


def _say(dataset: Dataset) -> None:
    """What was left out of a set or is wrong with it, on stderr."""
    for line in [*dataset.notes, *dataset.flaws]:
        print(line, file=sys.stderr)


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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
