"""Writing one shard of a packing: its samples encoded, its tar and index published."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dattrain.data.annotations import instances, maps
from dattrain.data.annotations.semantic import semantic_map
from dattrain.data.decode import images
from dattrain.data.prepare.contents import Contents
from dattrain.data.source import tar
from dattrain.data.source.annotation_index import AnnotationIndex
from dattrain.data.source.build_index import MAP_EXTENSION
from dattrain.data.source.dataset import NO_LABEL, BadSample, Dataset, Sample, locate
from dattrain.data.source.fields import fields
from dattrain.data.source.files import read_file
from dattrain.data.source.index import (
    CatalogueEntry,
    ShardIndex,
    read_index,
    read_json,
    to_json,
    write_atomically,
    write_index,
)
from dattrain.data.worker_progress import note
from dattrain.errors import UserError
from dattrain.files import replacing, sync

_AS_THEY_ARE = {"jpeg": "jpg", "png": "png", "webp": "webp"}


@dataclass(frozen=True)
class PackOptions:
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
        drop_empty: of objects, leave out the images that ``empty.find_empty`` finds.
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
    drop_empty: bool = False
    skip_bad: bool = False
    label_set: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class PackedShard:
    """What became of one shard: its catalogue entry, labels, the samples that were left out, and what its annotations hold."""

    name: str
    entry: CatalogueEntry
    histogram: dict[int, int]
    bad: list[tuple[str, str]]
    contents: Contents


@dataclass(frozen=True)
class _Packed:
    """A sample as it is written: members by extension, the image first; ``annotation`` is the extension of what annotates it."""

    label: int
    key: str
    members: tuple[tuple[str, bytes], ...]
    annotation: str | None = None
    height: int = 0
    width: int = 0
    contents: Contents = field(default_factory=Contents)


class ShardWriter:
    """Writes shards; lives in each process."""

    def __init__(
        self, source: Dataset, folder: Path, options: PackOptions, classes: Sequence[str] | None
    ) -> None:
        self.source = source
        self.folder = folder
        self.options = options
        self.classes = None if classes is None else list(classes)
        self._numbers = source.numbers
        if self._numbers is None and classes is not None:
            self._numbers = np.arange(len(classes), dtype=np.int64)

    def write(self, name: str, items: NDArray[np.int64]) -> PackedShard:
        """Write one shard under another name, then publish its index and itself, in that order."""
        note(name)
        path = self.folder / name
        offsets, lengths, labels, keys, bad = [], [], [], [], []
        annotations: list[tuple[int, int, int, int]] = []
        contents = Contents()
        digest = sha256()
        try:
            with replacing(path, durable=True) as part, open(part, "wb") as file:

                def put(data: bytes) -> None:
                    digest.update(data)
                    file.write(data)

                for item in items.tolist():
                    try:
                        packed = self._encode(item)
                    except BadSample as error:
                        bad.append((self.source.key(*locate(self.source, item)), str(error)))
                        if not self.options.skip_bad:
                            raise UserError(
                                f"{error}; remove it, or pack with --on-bad skip to leave out and name such samples"
                            ) from error
                        continue
                    labels.append(packed.label)
                    keys.append(packed.key)
                    contents += packed.contents
                    for suffix, content in packed.members:
                        put(tar.header(f"{packed.key}.{suffix}", len(content)))
                        if suffix == packed.members[0][0]:
                            offsets.append(file.tell())
                            lengths.append(len(content))
                        elif suffix == packed.annotation:
                            annotations.append((file.tell(), len(content), packed.height, packed.width))
                        put(content)
                        put(tar.padding(len(content)))
                put(tar.END)
                size = file.tell()
                kind = self.source.annotations
                index = ShardIndex.build(
                    offsets,
                    lengths,
                    labels,
                    keys,
                    size=size,
                    sha256=digest.hexdigest(),
                    annotated=None if kind == "none" else AnnotationIndex.build(kind, annotations),
                )
                # A tar without index could be taken for a foreign shard; an index without tar says nothing.
                if bad:
                    write_atomically(self.folder / f".{name}.bad", json.dumps(bad).encode())
                if kind != "none":
                    write_atomically(self._contents(name), contents.to_json())
                write_index(str(path), index)
            sync(self.folder)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); what is published stays"
            ) from error
        return self._describe(name, index, bad, contents)

    def done(self, name: str) -> PackedShard | None:
        """The shard if it is published."""
        path = self.folder / name
        try:
            index = read_index(str(path))
            if path.stat().st_size != index.size:
                return None
            note = self.folder / f".{name}.bad"
            bad = read_json(note) or []
            annotated = self.source.annotations != "none"
            contents = Contents.of_json(read_file(self._contents(name))) if annotated else Contents()
            return self._describe(name, index, [(key, reason) for key, reason in bad], contents)
        except (
            FileNotFoundError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ):  # UserError is a ValueError
            return None

    def _contents(self, name: str) -> Path:
        """Where the contents of a shard are noted, so that a packing that goes on need not read it."""
        return self.folder / f".{name}.contents"

    def _describe(
        self, name: str, index: ShardIndex, bad: list[tuple[str, str]], contents: Contents
    ) -> PackedShard:
        if self.source.annotations != "none":
            return PackedShard(name, CatalogueEntry.of(index), dict(contents.histogram), bad, contents)
        labels, counts = np.unique(index.labels[index.labels != NO_LABEL], return_counts=True)
        return PackedShard(
            name, CatalogueEntry.of(index), dict(zip(labels.tolist(), counts.tolist())), bad, contents
        )

    def _encode(self, item: int) -> _Packed:
        """One sample as it is written. Raises BadSample."""
        options, annotated = self.options, self.source.annotations != "none"
        sample = self.source.read(*locate(self.source, item))
        if sample.label == NO_LABEL and not annotated:
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
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", os.path.splitext(os.path.basename(name))[0])[:64]
        key = f"{item:08d}" if stem == str(item) else f"{item:08d}-{stem}"
        members: tuple[tuple[str, bytes], ...]
        if self.source.annotations == "instances":
            return self._with_objects(
                sample, key, wanted, data, {"filename": name, "height": height, "width": width}
            )
        # What the source's own .json says stays, but where it is about what this packing decides.
        info = {"filename": name, **fields(self.source, *locate(self.source, item))}
        if annotated:
            own = "png" if wanted != "png" else MAP_EXTENSION
            found = semantic_map(sample.annotation, (height, width), self._numbers, sample.where)
            info.update({"height": height, "width": width})
            members = ((wanted, data), (own, maps.write(found)), ("json", to_json(info)))
            return _Packed(NO_LABEL, key, members, own, height, width, Contents.of_map(found, sample.key))
        info.update({"label": sample.label, "height": height, "width": width})
        if self.classes:
            info["class"] = self.classes[sample.label]
        members = ((wanted, data), ("cls", b"%d" % sample.label), ("json", to_json(info)))
        return _Packed(sample.label, key, members)

    def _with_objects(
        self, sample: Sample, key: str, wanted: str, data: bytes, also: dict[str, Any]
    ) -> _Packed:
        """A sample whose ``.json`` holds the objects of its image."""
        size = int(also["height"]), int(also["width"])
        instances.check(sample.annotation, size, None, sample.where)
        content = instances.renumbered(sample.annotation, self._numbers, also, sample.where)
        background = 0 if self._numbers is None else int(self._numbers[0])
        found = Contents.of_objects(content, background, sample.key)
        return _Packed(NO_LABEL, key, ((wanted, data), ("json", content)), "json", *size, found)


def _encode_anew(data: bytes, options: PackOptions, kind: str) -> tuple[bytes, int, int]:
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
