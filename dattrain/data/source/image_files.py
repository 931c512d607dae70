"""A data set of image files: what a folder of classes and a list of paths have in common."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dattrain.data.source import files
from dattrain.data.source.sample import BadSample, BaseDataset, Sample
from dattrain.data.worker_progress import note


class ImageFiles(BaseDataset, ABC):
    """One shard of image files below a folder. A subclass says by ``file`` which they are.

    Args:
        name: of the folder or list, for messages and keys.
        root: folder that the files' paths are relative to.
        labels: of the files, N integers.
        origin: added to a file's name in the message about a bad one.
    """

    def __init__(self, name: str, root: Path, labels: NDArray[np.integer], *, origin: str = "") -> None:
        self.name, self.root = name, root
        self.counts = np.asarray([len(labels)], dtype=np.int64)
        self.max_label = int(labels.max())
        self._labels, self._origin = labels, origin

    @abstractmethod
    def file(self, sample: int) -> str:
        """Path below the root of a sample's file."""

    def key(self, shard: int, sample: int) -> str:
        """See ``Dataset.key``; the path below the root."""
        return f"{Path(self.name).name}:{self.file(sample)}"

    def label(self, shard: int, sample: int) -> int:
        """See ``Dataset.label``."""
        return self._number(int(self._labels[sample]), self.name)

    def read(self, shard: int, sample: int) -> Sample:
        """See ``Dataset.read``."""
        path = self.root / self.file(sample)
        note(str(path))
        data = read_file(path, self._origin)
        return Sample(self.key(shard, sample), str(path), self.label(shard, sample), data)


def read_file(path: Path, origin: str = "") -> bytes:
    """The bytes of an image file. Raises BadSample; ``origin`` is added to the name there."""
    try:
        data = files.read_file(path)
    except OSError as error:
        if path.is_symlink() and not path.exists():
            raise BadSample(f"{path}{origin}: a link to {os.readlink(path)}, which is not there") from error
        raise BadSample(f"{path}{origin}: cannot be read ({error.strerror})") from error
    if not data:
        raise BadSample(f"{path}{origin}: the image has zero bytes")
    return data
