"""``dattrain data pack|verify|index|ls|stats``: everything about shards that is not training."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from dattrain.cli import data_pack
from dattrain.cli.arguments import positive
from dattrain.cli.data_output import say, say_left_out
from dattrain.errors import UserError
from dattrain.files import counted, readable_size
from dattrain.runtime.progress import Progress
from dattrain.urls import mask

if TYPE_CHECKING:
    from dattrain.data.prepare.index_shards import IndexedShard
    from dattrain.data.source.dataset import Dataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    jobs = argparse.ArgumentParser(add_help=False)
    jobs.add_argument(
        "--jobs", type=positive, default=len(os.sched_getaffinity(0)), metavar="N", help="processes"
    )

    remote = argparse.ArgumentParser(add_help=False)
    remote.add_argument("--cache-dir", metavar="DIR", help="where shards at s3://, https://, ... are kept")

    p = actions.add_parser(
        "pack", parents=[jobs, remote], help="write shuffled WebDataset shards; run it again after a kill"
    )
    data_pack.add_arguments(p)

    v = actions.add_parser(
        "verify", parents=[jobs, remote], help="read every byte, decode every image, name what is bad"
    )
    v.add_argument("data", metavar="DATA", help="shards (folder, file, pattern) or image folder")
    v.add_argument("--classes", type=positive, metavar="N", help="labels must be below N")

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
        "--limit", type=positive, default=20_000, metavar="N", help="headers to read (default: 20000)"
    )
    s.add_argument("--all", action="store_true", help="read the headers of all images")
    s.add_argument("--out", metavar="FILE", help="picture, .png or .pdf (default: none)")


def run(args: argparse.Namespace) -> int:
    """Exit code 0; ``verify`` gives 1 where something is bad, ``index`` where an image or label is lost."""
    return {"pack": data_pack.run, "verify": _verify, "index": _index, "ls": _ls, "stats": _stats}[
        args.action
    ](args)


def _verify(args: argparse.Namespace) -> int:
    from dattrain.data.prepare.contents import ONLY_DETECTION
    from dattrain.data.prepare.verify import verify
    from dattrain.data.source.dataset import open_dataset

    problems: list[str] = []
    dataset = open_dataset(args.data, cache_dir=args.cache_dir, problems=problems)
    say(dataset)
    with Progress("verifying") as progress:
        report = verify(dataset, jobs=args.jobs, num_classes=args.classes, progress=progress)
    report.damaged[:0] = problems
    for message in report.damaged:
        print(f"damaged: {message}")
    for key, reason in report.bad:
        print(f"bad: {key}: {reason}")
    say_left_out(report.left_out)
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
    lost = say_left_out([some for shard in shards for some in shard.left_out])
    _warn_of_order(shards)
    if missing and not args.drop:
        raise UserError(inventory.missing_message(missing, where=args.out))
    return 1 if lost else 0


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
    say(dataset)
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
    say(dataset)
    with Progress("reading headers") as progress:
        stats = measure(dataset, limit=None if args.all else args.limit, jobs=args.jobs, progress=progress)
    print("\n".join(stats.lines()))
    if args.out:
        draw(stats, args.out)
        print(f"picture      {args.out}")
    return 0
