"""What ``data pack`` reads: an image folder, a list file, IDX or npz arrays, ImageNet's class tars, or shards.

Each is a ``Dataset``, with the names of its classes where it knows them.
"""

from __future__ import annotations

import os
import re

from dattrain.data.prepare.arrays import ArrayDataset, labels_beside, read_idx, read_npz
from dattrain.data.prepare.list_file import ListDataset
from dattrain.data.source.class_tars import ClassTars, find
from dattrain.data.source.dataset import open_dataset
from dattrain.data.source.fields import Relabelled
from dattrain.data.source.listing import is_remote
from dattrain.data.source.sample import Dataset


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
    if os.path.isfile(path):
        if path.endswith(".npz"):
            return read_npz(path)
        if re.search(r"idx[0-9]-ubyte(\.gz)?$|\.idx3?(\.gz)?$", path):
            return ArrayDataset(path, read_idx(path), read_idx(labels or labels_beside(path)))
        if re.search(r"\.(txt|csv|tsv|lst|list)$", path):
            return ListDataset(path, root)
    tars = find(path)
    return open_dataset(path) if tars is None else ClassTars(path, tars, jobs=jobs)
