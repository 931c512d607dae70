"""What a training set says of its classes, for a submission: images of folders are not listed, which may be millions."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass

from dattrain.data.annotations import map_folder
from dattrain.data.source.annotation_index import Annotations
from dattrain.data.source.dataset import open_dataset
from dattrain.data.source.folders import class_folders
from dattrain.data.source.index import NO_LABEL
from dattrain.data.source.shards import holds_shards
from dattrain.errors import UserError


@dataclass(frozen=True)
class Glance:
    """As ``Dataset`` has them."""

    annotations: Annotations
    classes: Sequence[str] | None = None
    used: Collection[int] | None = None
    max_label: int = NO_LABEL


def glance(spec: str) -> Glance:
    """Look at a local ``data.train``.

    Raises:
        UserError: it is not there, or is no set; what else ``open_dataset`` raises.
    """
    if os.path.isdir(spec) and not holds_shards(spec):
        beside = map_folder.map_folder(spec)
        if beside is not None:
            return Glance("maps", map_folder.class_names(spec, beside)[0])
        if not (names := class_folders(spec)):
            raise UserError(f"{spec}: has neither tar shards nor class folders")
        return Glance("none", names)
    with closing(open_dataset(spec)) as dataset:
        return Glance(dataset.annotations, dataset.classes, dataset.used, dataset.max_label)
