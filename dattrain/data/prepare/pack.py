"""Packing a source into shuffled WebDataset shards, in parallel; after a kill it goes on where it was.

The samples are permuted once by the seed, and shard ``k`` is a function of that permutation: any process can write
it, writing it twice gives the same bytes, and a shard whose tar and index are both published is done. So nothing is
held in memory but the permutation, and nothing is lost or doubled however often a packing is killed.
"""

from __future__ import annotations

import fcntl
import glob
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dattrain.data.board import note
from dattrain.data.decode import images
from dattrain.data.philox import Stream, words
from dattrain.data.prepare.dedup import find_duplicates
from dattrain.data.source import tar
from dattrain.data.source.dataset import NO_LABEL, BadSample, Dataset, locate
from dattrain.data.source.fields import fields
from dattrain.data.source.folders import FolderDataset
from dattrain.data.source.index import (
    Entry,
    ShardIndex,
    read_catalogue,
    read_index,
    read_json,
    to_json,
    write_atomically,
    write_catalogue,
    write_index,
)
from dattrain.data.source.manifest import agree
from dattrain.data.workers import Workers
from dattrain.errors import UserError
from dattrain.files import replacing, sync

_AS_THEY_ARE = {"jpeg": "jpg", "png": "png", "webp": "webp"}


@dataclass(frozen=True)
class Options:
    """How to pack.

    Attributes:
        split: prefix of the shards' names.
        holdout: samples, drawn by the seed, that go to ``holdout_split`` instead.
        per_shard: samples per shard, at most.
        seed: of the permutation; None keeps the source's order.
        resize: pixels of the shorter side of larger images; None keeps them.
        format: ``jpg``, ``png`` or ``webp`` to encode anew; None keeps what need not be changed.
        quality: of jpg and webp.
        check: decode every image, else read its header alone.
        dedup: keep the first of the samples with equal bytes.
        label: field of the source's ``.json`` that its labels were taken from, as the source was opened; None is its own.
        skip_bad: leave out and name what cannot be used, else stop.
        label_set: one of ``data.labels``, whose numbers the source's synsets take; None numbers its classes as the split
            that is in the folder already does, else in their order.
    """

    split: str = "train"
    holdout: int = 0
    holdout_split: str = "val"
    per_shard: int = 4096
    seed: int | None = 0
    resize: int | None = None
    format: str | None = None
    quality: int = 92
    check: bool = True
    dedup: bool = False
    skip_bad: bool = False
    label_set: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Done:
    """What became of one shard: its catalogue entry, class histogram, and the samples that were left out."""

    name: str
    entry: Entry
    histogram: dict[int, int]
    bad: list[tuple[str, str]]


def pack(
    source: Dataset,
    out: str | os.PathLike[str],
    options: Options,
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
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        total = int(source.counts.sum())
        for leftover in folder.glob(".*.part"):
            leftover.unlink()
        own = {options.split, options.holdout_split} if options.holdout else {options.split}
        classes = agree(folder, source, own, options.label_set)
        _same_settings(folder, source, options)
        packer = _Packer(source, folder, options, classes)
        items = np.arange(total, dtype=np.int64)
        if options.dedup:
            items = items[~find_duplicates(source, folder, jobs=jobs)]
        if not 0 <= options.holdout < len(items):
            raise UserError(
                f"a holdout of {options.holdout} of {len(items)} samples; it must be fewer than all"
            )
        items = _permute(items, options.seed)
        splits = [(options.split, items[options.holdout :])]
        if options.holdout:
            splits.append((options.holdout_split, items[: options.holdout]))
        return [_pack_split(packer, split, chosen, jobs, progress) for split, chosen in splits]


def shard_names(split: str, samples: int, per_shard: int) -> list[str]:
    """File names of a split's shards."""
    count = max(1, -(-samples // per_shard))
    digits = max(4, len(str(count - 1)))
    return [f"{split}-{k:0{digits}d}.tar" for k in range(count)]


class _Packer:
    """Writes shards; lives in each process."""

    def __init__(
        self, source: Dataset, folder: Path, options: Options, classes: Sequence[str] | None
    ) -> None:
        self.source = source
        self.folder = folder
        self.options = options
        self.classes = None if classes is None else list(classes)

    def write(self, name: str, items: NDArray[np.int64]) -> Done:
        """Write one shard aside, then publish its index and itself, in that order."""
        note(name)
        path = self.folder / name
        offsets, lengths, labels, keys, bad = [], [], [], [], []
        digest = sha256()
        try:
            with replacing(path, durable=True) as part, open(part, "wb") as file:

                def put(data: bytes) -> None:
                    digest.update(data)
                    file.write(data)

                for item in items.tolist():
                    try:
                        label, key, extension, data, info = self._encode(item)
                    except BadSample as error:
                        bad.append((self.source.key(*locate(self.source, item)), str(error)))
                        if not self.options.skip_bad:
                            raise UserError(
                                f"{error}; remove it, or pack with --on-bad skip to leave out and name such samples"
                            ) from error
                        continue
                    offsets.append(file.tell() + tar.BLOCK)
                    lengths.append(len(data))
                    labels.append(label)
                    keys.append(key)
                    meta = to_json(info)
                    for suffix, content in ((extension, data), ("cls", b"%d" % label), ("json", meta)):
                        put(tar.header(f"{key}.{suffix}", len(content)))
                        put(content)
                        put(tar.padding(len(content)))
                put(tar.END)
                size = file.tell()
                index = ShardIndex.build(offsets, lengths, labels, keys, size=size, sha256=digest.hexdigest())
                # A tar without index could be taken for a foreign shard; an index without tar says nothing.
                if bad:
                    write_atomically(self.folder / f".{name}.bad", json.dumps(bad).encode())
                write_index(str(path), index)
            sync(self.folder)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); what is published stays"
            ) from error
        return self._describe(name, index, bad)

    def done(self, name: str) -> Done | None:
        """The shard if it is published."""
        path = self.folder / name
        try:
            index = read_index(str(path))
            if path.stat().st_size != index.size:
                return None
            note = self.folder / f".{name}.bad"
            bad = read_json(note) or []
            return self._describe(name, index, [(key, reason) for key, reason in bad])
        except (FileNotFoundError, ValueError, TypeError):  # UserError is a ValueError
            return None

    def _describe(self, name: str, index: ShardIndex, bad: list[tuple[str, str]]) -> Done:
        labels, counts = np.unique(index.labels, return_counts=True)
        return Done(name, Entry.of(index), dict(zip(labels.tolist(), counts.tolist())), bad)

    def _encode(self, item: int) -> tuple[int, str, str, bytes, dict[str, Any]]:
        """Label, key, extension, bytes and ``.json`` of one sample. Raises BadSample."""
        options = self.options
        sample = self.source.read(*locate(self.source, item))
        if sample.label == NO_LABEL:
            raise BadSample(f"{sample.where}: has no label")
        data = sample.data
        try:
            height, width = images.size(data)
            kind = _AS_THEY_ARE.get(images.sniff(data))
            wanted = options.format or kind or "png"
            if wanted != kind or (options.resize is not None and min(height, width) > options.resize):
                data, height, width = _encode_anew(data, options, wanted)
            elif options.check:
                images.decode(data)
        except images.BadImage as error:
            raise BadSample(f"{sample.where}: {error}") from error
        name = sample.key.partition(":")[2]
        # What the source's own .json says stays, but where it is about what this packing decides.
        info = {"filename": name, **fields(self.source, *locate(self.source, item))}
        info.update({"label": sample.label, "height": height, "width": width})
        if self.classes:
            info["class"] = self.classes[sample.label]
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", os.path.splitext(os.path.basename(name))[0])[:64]
        key = f"{item:08d}" if stem == str(item) else f"{item:08d}-{stem}"
        return sample.label, key, wanted, data, info


def _encode_anew(data: bytes, options: Options, kind: str) -> tuple[bytes, int, int]:
    """Bytes, height and width of the image in another format, with its shorter side reduced to ``options.resize``."""
    image = images.decode_pillow(data)
    if options.resize is not None and min(image.size) > options.resize:
        scale = options.resize / min(image.size)
        new = tuple(max(options.resize, round(side * scale)) for side in image.size)
        image = image.resize((new[0], new[1]), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    if kind == "png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, {"jpg": "JPEG", "webp": "WEBP"}[kind], quality=options.quality)
    return buffer.getvalue(), image.height, image.width


def _pack_split(
    packer: _Packer,
    split: str,
    items: NDArray[np.int64],
    jobs: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Write the shards of a split that are not there yet, then its manifest, ``_info.json`` and the catalogue."""
    options = packer.options
    names = shard_names(split, len(items), options.per_shard)
    # Shards of even length, so that a shuffle window holds the same number of them everywhere.
    cuts = [len(items) * k // len(names) for k in range(len(names) + 1)]
    done = {name: found for name in names if (found := packer.done(name))}
    missing = [k for k, name in enumerate(names) if name not in done]
    packed = sum(cuts[k + 1] - cuts[k] for k, name in enumerate(names) if name in done)
    progress(packed, len(items))
    with Workers(
        lambda i: packer.write(names[missing[i]], items[cuts[missing[i]] : cuts[missing[i] + 1]]),
        count=len(missing),
        workers=jobs if jobs > 1 else 0,
        prefetch=1,
        in_order=False,
    ) as shards:
        for shard in shards:
            done[shard.name] = shard
            packed += shard.entry.samples + len(shard.bad)
            progress(packed, len(items))
    return _publish(packer, split, [done[name] for name in names])


def _publish(packer: _Packer, split: str, shards: list[Done]) -> dict[str, Any]:
    folder = packer.folder
    histogram: dict[int, int] = {}
    for shard in shards:
        for label, count in shard.histogram.items():
            histogram[label] = histogram.get(label, 0) + count
    samples = sum(shard.entry.samples for shard in shards)
    if not samples:
        raise UserError(f"{packer.source.name}: none of its samples for {split} can be used")
    manifest: dict[str, Any] = {
        "split": split,
        "samples": samples,
        "bytes": sum(shard.entry.size for shard in shards),
        "classes": packer.classes,
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
        "bad": [{"key": key, "reason": reason} for shard in shards for key, reason in shard.bad],
        "source": packer.source.name,
        "options": asdict(packer.options),
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


def _permute(items: NDArray[np.int64], seed: int | None) -> NDArray[np.int64]:
    """The items in an order drawn by the seed."""
    if seed is None:
        return items
    key = np.empty(len(items), dtype=np.uint64)
    for start in range(0, len(items), 1 << 18):
        w = words(seed, Stream.PACK, items[start : start + (1 << 18)], 2)
        key[start : start + len(w)] = (w[:, 0] << np.uint64(32)) | w[:, 1]
    return items[np.argsort(key, kind="stable")]


def _same_settings(folder: Path, source: Dataset, options: Options) -> None:
    """Note the settings of a packing, or compare them with those noted."""
    digest = blake2b(digest_size=16)
    for shard, count in enumerate(source.counts.tolist()):
        for sample in range(count):
            digest.update(
                f"{source.key(shard, sample)}\t{source.label(shard, sample)}\n".encode(
                    "utf-8", "surrogateescape"
                )
            )
    settings = {**asdict(options), "source": source.name, "content": digest.hexdigest()}
    path = folder / f".{options.split}.settings.json"
    noted = read_json(path)
    if noted is not None and not isinstance(noted, dict):
        raise UserError(f"{path}: is not what a packing notes there; remove it, or pack into another folder")
    if noted is not None:
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
