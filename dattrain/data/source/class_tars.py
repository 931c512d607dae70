"""ImageNet as it is given out: a tar of images per synset, in a folder or within one more tar, read where it lies.

``n01440764.tar`` holds ``n01440764_10026.JPEG``, ...; the releases (``winter21_whole.tar``, ``fall11_whole.tar``,
``ILSVRC2012_img_train.tar``) hold such tars. Headers are read once; images are then read by their offset in the file,
so that nothing is unpacked, and nothing held but names and places (about 50 bytes an image).
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from dattrain.data.classes import few
from dattrain.data.decode.images import IMAGE_EXTENSIONS
from dattrain.data.source import inventory, tar
from dattrain.data.source.build_index import UNREAD_PICTURES
from dattrain.data.source.dataset import Sample, ShardDataset
from dattrain.data.source.files import explained, listing
from dattrain.data.source.index import CatalogueEntry, LeftOut, ShardIndex, leave_out
from dattrain.data.source.manifest import Named
from dattrain.data.source.shards import LocalSource, Shards, expand
from dattrain.data.workers import Workers
from dattrain.errors import UserError


class ClassTars(ShardDataset):
    """One shard per class, made of the tars that ``find`` found; labels number the sorted classes.

    Args:
        name: of the source, for messages.
        tars: (class, file, offset of the tar in the file, its size) of each class.
        jobs: processes that read headers.

    Attributes:
        classes: names by label.

    Raises:
        UserError: a tar is damaged, a class comes twice, or no images are there.
    """

    def __init__(self, name: str, tars: Sequence[tuple[str, str, int, int]], *, jobs: int = 1) -> None:
        tars = sorted(tars)
        classes = [class_name for class_name, *_ in tars]
        for one, two in itertools.pairwise(classes):
            if one == two:
                raise UserError(f"{name}: {one}.tar comes twice")
        with Workers(
            lambda i: _index(*tars[i], label=i), count=len(tars), workers=jobs if jobs > 1 else 0
        ) as found:
            self._built = list(found)
        shards = Shards.build(
            [path for _, path, *_ in tars], [CatalogueEntry.of(index) for index in self._built]
        )
        super().__init__(name, shards, LocalSource(shards), named=Named(tuple(classes), None))
        if not self.counts.sum():
            raise UserError(f"{name}: its tars hold no images")
        if none := [classes[i] for i in np.flatnonzero(self.counts == 0)]:
            self.notes = (f"{name}: the tars of {len(none):,} classes hold no images: {few(none)}",)

    def key(self, shard: int, sample: int) -> str:
        """See ``Dataset.key``; class and file name stand for the key."""
        file = os.path.basename(self.index(shard).key(sample))
        assert self.classes is not None
        return f"{os.path.basename(self.name)}:{self.classes[shard]}/{file}"

    def read(self, shard: int, sample: int) -> Sample:
        """See ``Dataset.read``."""
        return replace(super().read(shard, sample), key=self.key(shard, sample))

    def index(self, shard: int) -> ShardIndex:
        """The index of a class, of the whole names of its images."""
        return self._built[shard]


def find(path: str) -> list[tuple[str, str, int, int]] | None:
    """The classes of a folder, pattern or tar: (class, file, offset of its tar in the file, size of the tar).

    None where it is no such release.

    Raises:
        UserError: a tar of tars is damaged or holds others too; other classes are there as folders.
    """
    if "://" in path or (os.path.isdir(path) and not any(e.name.endswith(".tar") for e in listing(path))):
        return None
    files = expand(path)
    known = inventory.recorded_shards(os.path.dirname(files[0]) or ".")
    if os.path.basename(files[0]) in known or not inventory.class_tar(files[0]):
        return None
    tars = []
    for file in files:
        match = inventory.SYNSET_TAR.search(file)
        if match:
            with explained(file):
                tars.append((match[1], file, 0, os.stat(file).st_size))
            continue
        for member in tar.scan(file):
            inner = inventory.SYNSET_TAR.search(member.name)
            if inner is None or not member.readable:
                raise UserError(
                    f"{file}: holds {member.name!r} ({member.kind}) among the tars of its classes; unpack it, and pack the "
                    "folder"
                )
            tars.append((inner[1], file, member.offset, member.size))
    if os.path.isdir(path):
        _check_folders(path, {name for name, *_ in tars})
    return tars


def _check_folders(path: str, classes: Collection[str]) -> None:
    """Refuse class folders beside tars of other classes: an extraction that removes each tar and was stopped."""
    folders = sorted(e.name for e in os.scandir(path) if re.fullmatch(r"n\d{8}", e.name) and e.is_dir())
    if others := [name for name in folders if name not in classes]:
        raise UserError(
            f"{path}: holds tars of {len(classes):,} classes, and {len(others):,} other classes as folders ({few(others)}), as an "
            "extraction that was stopped leaves them; finish it, or move one kind elsewhere"
        )


def _index(class_name: str, path: str, start: int, size: int, *, label: int) -> ShardIndex:
    offsets, lengths, linked = [], [], []
    keys: list[str] = []
    left_out: dict[str, LeftOut] = {}
    try:
        for member in tar.scan(path, start=start, size=size):
            extension = member.name.rpartition(".")[2].lower()
            if not os.path.basename(member.name).startswith("."):
                if member.readable and extension in IMAGE_EXTENSIONS:
                    if member.kind == tar.HARD_LINK:
                        linked.append(len(keys))
                    offsets.append(member.offset)
                    lengths.append(member.size)
                    keys.append(member.name)
                else:
                    kind = f".{extension}" if member.readable else member.kind
                    lost = extension in UNREAD_PICTURES or not member.readable
                    leave_out(left_out, kind, member.name, lost=lost)
    except UserError as error:
        raise UserError(f"{class_name}.tar in {error}" if start else str(error)) from error
    return ShardIndex.build(
        offsets,
        lengths,
        [label] * len(offsets),
        keys,
        size=os.stat(path).st_size,
        linked=linked,
        left_out=left_out.values(),
    )
