"""Image files with annotations: what folders of maps, COCO's JSON and VOC have in common as data sets."""

from __future__ import annotations

import os
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dattrain.data.annotations.orientation import upright
from dattrain.data.annotations.semantic import annotated_size
from dattrain.data.source.folders import scrambled
from dattrain.data.source.image_files import ImageFiles, read_file
from dattrain.data.source.index import NO_LABEL
from dattrain.data.source.sample import Sample
from dattrain.data.worker_progress import note
from dattrain.errors import UserError


class Rows:
    """Byte strings in one array: workers that were forked share its pages, which a list's counts of references would copy."""

    def __init__(self, rows: Iterable[bytes]) -> None:
        joined, ends = bytearray(), array("q", [0])
        for row in rows:
            joined += row
            ends.append(len(joined))
        self.bytes: NDArray[np.uint8] = np.frombuffer(joined, dtype=np.uint8)
        self._ends = np.frombuffer(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> bytes:
        return self.bytes[self._ends[row] : self._ends[row + 1]].tobytes()


class AnnotatedFiles(ImageFiles):
    """One shard of image files with an annotation each, in a fixed scrambled order (as ``FolderDataset``'s).

    ``digest`` is SHA-256 of the hashes of all names, in order. A subclass sets ``classes`` and ``annotations``.

    Args:
        name: for messages and keys.
        root: folder that the files' paths are relative to.
        files: those paths.
        origin: see ``ImageFiles``.

    Raises:
        UserError: there are no files.
    """

    def __init__(self, name: str, root: Path, files: Sequence[str], *, origin: str = "") -> None:
        encoded = [os.fsencode(file) for file in files]
        keys = np.asarray([scrambled(file) for file in encoded], dtype=np.uint64)
        self.place: NDArray[np.intp] = np.lexsort((np.arange(len(keys)), keys))
        """Number in ``files`` of each sample."""
        self._files = Rows(encoded[i] for i in self.place.tolist())
        self.digest = sha256(keys[self.place].astype("<u8").tobytes()).hexdigest()
        if not files:
            raise UserError(f"{name}: has no images")
        super().__init__(name, root, np.broadcast_to(np.int64(NO_LABEL), len(files)), origin=origin)

    @property
    @abstractmethod
    def annotation_digest(self) -> str:
        """SHA-256 of what tells these annotations from others of the same images."""

    @abstractmethod
    def annotation(self, sample: int) -> bytes:
        """See ``Sample.annotation``. Raises BadSample."""

    def file(self, sample: int) -> str:
        """See ``ImageFiles.file``."""
        return os.fsdecode(self._files[sample])

    def read(self, shard: int, sample: int) -> Sample:
        """See ``Dataset.read``; an image that its EXIF orientation turns to the annotation's size comes turned."""
        path = self.root / self.file(sample)
        note(str(path))
        data = read_file(path, self._origin)
        annotation = self.annotation(sample)
        data = upright(data, annotated_size(annotation), str(path))
        return Sample(self.key(shard, sample), str(path), NO_LABEL, data, annotation)
