"""Packing a source into shuffled WebDataset shards, in parallel; after a kill it resumes where it was.

The samples are permuted once by the seed, and shard ``k`` is a function of that permutation: any process can write
it, writing it twice gives the same bytes, and a shard whose tar and index are both published is done. So nothing is
held in memory but the permutation, and nothing is lost or doubled however often a packing is killed.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dattrain.data.annotations.annotated import AnnotatedFiles
from dattrain.data.annotations.map_folder import ADE_NAMES
from dattrain.data.annotations.maps import VOID
from dattrain.data.philox import Stream, words
from dattrain.data.prepare.contents import Contents
from dattrain.data.prepare.dedup import find_duplicates
from dattrain.data.prepare.empty import EMPTY, SMALL, find_empty
from dattrain.data.prepare.write_shard import PackedShard, PackOptions, ShardWriter
from dattrain.data.source.dataset import Dataset
from dattrain.data.source.folders import FolderDataset
from dattrain.data.source.index import read_catalogue, read_json, to_json, write_atomically, write_catalogue
from dattrain.data.source.manifest import classes_to_pack
from dattrain.data.workers import Workers
from dattrain.errors import UserError
from dattrain.files import counted


def pack(
    source: Dataset,
    out: str | os.PathLike[str],
    options: PackOptions,
    *,
    jobs: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Pack ``source`` into ``out``; returns the manifest of each split, as written to ``_<split>.manifest.json``.

    Args:
        jobs: processes.
        progress: called with the samples packed so far and in all.

    Raises:
        UserError: a sample that cannot be used (without ``skip_bad``), a class that the label set or the folder's other split
            has not, settings that differ from those of the packing that ``out`` holds, another packing at work there, a full
            disk, or an ``out`` among the source's class folders.
    """
    folder = Path(out)
    if options.holdout and options.holdout_split == options.split:
        raise UserError(
            f"a holdout that is called {options.split!r} like the rest would overwrite it; name it otherwise"
        )
    if isinstance(source, FolderDataset) and source.covers(folder):
        raise UserError(
            f"{out}: lies among the class folders of {source.name}, and would be taken for one of them, or for the set itself, "
            "when this is run again; pack into another folder"
        )
    if source.annotations != "none":
        _check_annotated(source, options)
    if options.drop_empty:
        _check_objects(source)
    if source.flaws and not options.skip_bad:
        raise UserError(
            f"{'; '.join(source.flaws)}. Correct that, or pack with --on-bad skip to leave out and name what cannot be used"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        total = int(source.counts.sum())
        for leftover in folder.glob(".*.part"):
            leftover.unlink()
        own = {options.split, options.holdout_split} if options.holdout else {options.split}
        classes = classes_to_pack(folder, source, own, options.label_set)
        _same_settings(folder, source, options)
        writer = ShardWriter(source, folder, options, classes)
        items = np.arange(total, dtype=np.int64)
        if options.dedup:
            items = items[~find_duplicates(source, folder, jobs=jobs)]
        if not 0 <= options.holdout < len(items):
            raise UserError(
                f"a holdout of {options.holdout} of {len(items)} samples; it must be fewer than all"
            )
        dropped: list[dict[str, str]] = []
        if options.drop_empty:
            empty, dropped = find_empty(source, jobs=jobs)
            items = items[~empty[items]]
            if not len(items):
                raise UserError(
                    f"{source.name}: drop_empty leaves nothing: each of its {total:,} images has {EMPTY} or {SMALL}"
                )
        items = _permute(items, options.seed)
        splits = [(options.split, items[options.holdout :])]
        if options.holdout:
            splits.append((options.holdout_split, items[: options.holdout]))
        return [_pack_split(writer, split, chosen, dropped, jobs, progress) for split, chosen in splits]


def shard_names(split: str, samples: int, per_shard: int) -> list[str]:
    """File names of a split's shards."""
    count = max(1, -(-samples // per_shard))
    digits = max(4, len(str(count - 1)))
    return [f"{split}-{k:0{digits}d}.tar" for k in range(count)]


def _pack_split(
    writer: ShardWriter,
    split: str,
    items: NDArray[np.int64],
    dropped: list[dict[str, str]],
    jobs: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Write the shards of a split that are not there yet, then its manifest, ``_info.json`` and the catalogue."""
    options = writer.options
    names = shard_names(split, len(items), options.per_shard)
    # Shards of even length, so that a shuffle window holds the same number of them everywhere.
    cuts = [len(items) * k // len(names) for k in range(len(names) + 1)]
    done = {name: found for name in names if (found := writer.done(name))}
    missing = [k for k, name in enumerate(names) if name not in done]
    packed = sum(cuts[k + 1] - cuts[k] for k, name in enumerate(names) if name in done)
    progress(packed, len(items))
    with Workers(
        lambda i: writer.write(names[missing[i]], items[cuts[missing[i]] : cuts[missing[i] + 1]]),
        count=len(missing),
        workers=jobs if jobs > 1 else 0,
        prefetch=1,
        in_order=False,
    ) as shards:
        for shard in shards:
            done[shard.name] = shard
            packed += shard.entry.samples + len(shard.bad)
            progress(packed, len(items))
    return _publish(writer, split, [done[name] for name in names], dropped)


def _publish(
    writer: ShardWriter, split: str, shards: list[PackedShard], dropped: list[dict[str, str]]
) -> dict[str, Any]:
    folder = writer.folder
    histogram: dict[int, int] = {}
    for shard in shards:
        for label, count in shard.histogram.items():
            histogram[label] = histogram.get(label, 0) + count
    samples = sum(shard.entry.samples for shard in shards)
    if not samples:
        raise UserError(f"{writer.source.name}: none of its samples for {split} can be used")
    contents = sum((shard.contents for shard in shards), Contents())
    if contents.void_alone == samples:
        raise UserError(
            f"{writer.source.name}: the {counted(samples, 'map')} for {split} hold no class: every pixel is void, and nothing can be learnt. "
            f"{VOID} is void, and with an {ADE_NAMES} 0 is, too"
        )
    manifest: dict[str, Any] = {
        "split": split,
        "samples": samples,
        "bytes": sum(shard.entry.size for shard in shards),
        "classes": writer.classes,
        "histogram": {str(label): histogram[label] for label in sorted(histogram)},
        "shards": [
            {
                "name": shard.name,
                "samples": shard.entry.samples,
                "bytes": shard.entry.size,
                "sha256": shard.entry.sha256,
            }
            for shard in shards
        ],
        **_annotated(writer, contents),
        **({"dropped": dropped} if writer.options.drop_empty else {}),
        "bad": [{"key": key, "reason": reason} for shard in shards for key, reason in shard.bad],
        "source": writer.source.name,
        "options": asdict(writer.options),
    }
    catalogue = read_catalogue(folder)
    catalogue.update({shard.name: shard.entry for shard in shards})
    write_catalogue(folder, catalogue)
    info_path = folder / "_info.json"
    info = read_json(info_path) or {}
    if not isinstance(info, dict) or not isinstance(info.setdefault("splits", {}), dict):
        raise UserError(f"{info_path}: has no object of splits; restore it, or move it away")
    info["splits"][split] = {
        "name": split,
        "num_samples": samples,
        "filenames": [shard.name for shard in shards],
        "shard_lengths": [shard.entry.samples for shard in shards],
    }
    write_atomically(info_path, json.dumps(info, indent=2).encode())
    write_atomically(folder / f"_{split}.manifest.json", to_json(manifest, indent=1))
    return manifest


def _check_objects(source: Dataset) -> None:
    """Raise UserError where a set has no objects, of which images could have none."""
    if source.annotations != "instances":
        held = "maps" if source.annotations == "maps" else "no annotations"
        raise UserError(f"{source.name}: has {held}, and --drop-empty is for sets of objects")


def _check_annotated(source: Dataset, options: PackOptions) -> None:
    """Raise UserError for settings that would part images from their annotations, and for those of other annotations."""
    for given, name, why in (
        (options.resize, "--resize", "it would resize images and not what lies beside them; training resizes both (geometry.short_side)"),
        (options.dedup, "--dedup", "images with equal bytes may have other annotations"),
        (options.label_set, "--label-set", "it numbers the classes of images; those of pixels and objects have the set's own names"),
        (options.label, "--label", "its samples have annotations instead of labels"),
    ):  # fmt: skip
        if given:
            raise UserError(f"{source.name}: has annotations, with which {name} does not go: {why}")


def _annotated(writer: ShardWriter, contents: Contents) -> dict[str, Any]:
    """What a manifest says of annotations."""
    source = writer.source
    if source.annotations == "none":
        return {}
    return {
        "annotations": source.annotations,
        "maskless": contents.maskless,
        "category_ids": _category_ids(source, writer.classes),
        "contents": contents.lines(writer.classes),
        "notes": [*source.notes, *source.flaws],
    }


def _category_ids(source: Dataset, classes: Sequence[str] | None) -> list[int | None] | None:
    """``Dataset.category_ids`` of what is packed, whose classes may have other numbers than the source's own."""
    if source.category_ids is None or classes is None:
        return None
    if source.numbers is None:
        return list(source.category_ids)
    ids: list[int | None] = [None] * len(classes)
    for number, one in zip(source.numbers.tolist(), source.category_ids):
        if number >= 0:
            ids[number] = one
    return ids


def _permute(items: NDArray[np.int64], seed: int | None) -> NDArray[np.int64]:
    """The items in an order drawn by the seed."""
    if seed is None:
        return items
    key = np.empty(len(items), dtype=np.uint64)
    for start in range(0, len(items), 1 << 18):
        w = words(seed, Stream.PACK, items[start : start + (1 << 18)], 2)
        key[start : start + len(w)] = (w[:, 0] << np.uint64(32)) | w[:, 1]
    return items[np.argsort(key, kind="stable")]


def _same_settings(folder: Path, source: Dataset, options: PackOptions) -> None:
    """Note the settings of a packing, or compare them with those noted."""
    digest = blake2b(digest_size=16)
    for shard, count in enumerate(source.counts.tolist()):
        for sample in range(count):
            digest.update(
                f"{source.key(shard, sample)}\t{source.label(shard, sample)}\n".encode(
                    "utf-8", "surrogateescape"
                )
            )
    if isinstance(source, AnnotatedFiles):
        digest.update(source.annotation_digest.encode())
    settings = {**asdict(options), "source": source.name, "content": digest.hexdigest()}
    path = folder / f".{options.split}.settings.json"
    noted = read_json(path)
    if noted is not None and not isinstance(noted, dict):
        raise UserError(f"{path}: is not what a packing notes there; remove it, or pack into another folder")
    if noted is not None:
        noted = {**asdict(PackOptions()), **noted}  # one begun by a version without an option had its default
        differ = sorted(key for key in settings if noted.get(key) != settings[key])
        if differ:
            what = ", ".join(f"{key} ({noted.get(key)} then, {settings[key]} now)" for key in differ)
            raise UserError(
                f"{folder}: holds the shards of another packing of {options.split!r}: {what}; "
                "use another folder or --split, or remove them"
            )
        return
    for split in {options.split, options.holdout_split} if options.holdout else {options.split}:
        found = next(folder.glob(f"{glob.escape(split)}-[0-9]*.tar"), None)
        if found is not None:
            raise UserError(
                f"{found}: is there already, and is not of this packing; use another folder or --split"
            )
    write_atomically(path, json.dumps(settings).encode())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with open(folder / ".pack.lock", "w") as lock:
        # Workers inherit the lock; those of a packing that was just killed need a moment to be gone.
        for _ in range(50):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.1)
        else:
            raise UserError(f"{folder}: another packing is at work there")
        yield
