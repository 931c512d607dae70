"""What ``data pack`` reads: an image folder, a list file, IDX or npz arrays, ImageNet's class tars, or shards; ADE20K, COCO, VOC.

Each is a ``Dataset``, with the names of its classes where it knows them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from dattrain.data.annotations.coco import CocoDataset
from dattrain.data.annotations.map_folder import PAIRS, MapFolder, map_folder
from dattrain.data.annotations.voc import BOXES, MAPS, lists, split_of
from dattrain.data.annotations.voc_objects import open_voc
from dattrain.data.classes import few
from dattrain.data.prepare.arrays import ArrayDataset, labels_beside, read_idx, read_npz
from dattrain.data.prepare.list_file import ListDataset
from dattrain.data.source.class_tars import ClassTars, find
from dattrain.data.source.dataset import open_dataset
from dattrain.data.source.fields import Relabelled
from dattrain.data.source.files import listing
from dattrain.data.source.listing import is_remote
from dattrain.data.source.sample import Dataset
from dattrain.errors import UserError

_LONG = {"train": "training", "val": "validation"}
"""What ADE20K's folders call the splits of others."""


def open_source(
    path: str,
    *,
    labels: str | None = None,
    root: str | None = None,
    label: str | None = None,
    jobs: int = 1,
    cache_dir: str | None = None,
) -> Dataset:
    """Whatever ``path`` is, by its content and name.

    Args:
        labels: the IDX file of labels; found by name beside the images when None.
        root: folder to which a list file's paths are relative; the list's own when None.
        label: field of the ``.json`` of shards that holds the label; None takes that of their index.
        jobs: processes that read the headers of ImageNet's class tars.
        cache_dir: folder for shards that are remote.

    Raises:
        UserError: nothing there, or nothing that can be read.
    """
    source = _open(path, labels, root, cache_dir, jobs)
    return source if label is None else Relabelled(source, label)


def _open(path: str, labels: str | None, root: str | None, cache_dir: str | None, jobs: int) -> Dataset:
    if is_remote(path):
        return open_dataset(path, cache_dir=cache_dir)
    if os.path.isfile(path) and not split_of(path):
        if path.endswith(".npz"):
            return read_npz(path)
        if re.search(r"idx[0-9]-ubyte(\.gz)?$|\.idx3?(\.gz)?$", path):
            return ArrayDataset(path, read_idx(path), read_idx(labels or labels_beside(path)))
        if re.search(r"\.(txt|csv|tsv|lst|list)$", path):
            return ListDataset(path, root)
    tars = find(path)
    return open_dataset(path) if tars is None else ClassTars(path, tars, jobs=jobs)


def open_annotated(
    kind: str, path: str, *, split: str | None = None, images: str | None = None
) -> tuple[Dataset, str]:
    """A set as it is given out, with its annotations, and the name of its split.

    Args:
        kind: ``ade``, ``coco`` or ``voc``.
        path: the folder (of ``ade``: also that of one split's images; of ``voc``: also a list; a folder with lists of maps and of boxes
            gives the maps), or the JSON.
        split: which of the folder's; ``train`` and ``val`` also mean ``training`` and ``validation``. None takes ``train``, and of a JSON
            what its name says.
        images: folder of a JSON's images; None looks beside it.

    Raises:
        UserError: nothing there, or no such split.
    """
    if kind == "coco":
        said = re.search(r"(?:^|[^a-z])(train|val|test)", os.path.basename(path))
        return CocoDataset(path, images), split or (said[1] if said else "train")
    wanted = split or "train"
    if kind == "voc":
        if os.path.isfile(path):
            if not split_of(path):
                raise UserError(
                    f"{path}: is no list of a VOC folder: these are in {MAPS} (maps) and {BOXES} (boxes)"
                )
            return open_voc(path), split or Path(path).stem
        inside = MAPS if lists(Path(path), MAPS) else BOXES
        names = {name.removesuffix(".txt"): name for name in lists(Path(path), inside)}
        return open_voc(os.path.join(path, inside, _one(path, inside, names, wanted))), wanted
    for own, other in PAIRS.items():
        if os.path.isdir(os.path.join(path, own)) and os.path.isdir(os.path.join(path, other)):
            folders = {e.name: e.name for e in listing(os.path.join(path, own)) if e.is_dir()}
            path = os.path.join(path, own, _one(path, own, folders, wanted))
            break
    beside = map_folder(path)
    if beside is None:
        raise UserError(
            f"{path}: is no folder in ADE20K's layout; it must hold images and annotations, each with a folder for a split"
        )
    return MapFolder(path, beside), wanted


def _one(path: str, inside: str, found: Mapping[str, str], split: str) -> str:
    """What a folder has for a split. Raises UserError where it has none."""
    name = next((name for name in (split, _LONG.get(split, split)) if name in found), None)
    if name is None:
        raise UserError(
            f"{os.path.join(path, inside)}: has no split {split!r}; --split names one of {few(sorted(found)) or 'none'}"
        )
    return found[name]
