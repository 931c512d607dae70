"""Images in arrays: IDX files (MNIST's format) and numpy's npz."""

from __future__ import annotations

import gzip
import io
import os
import struct
import zipfile
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dattrain.data.source.index import MAX_LABEL
from dattrain.data.source.sample import BaseDataset, Sample
from dattrain.errors import UserError

_IMAGES, _LABELS = ("images", "x", "x_train", "data"), ("labels", "y", "y_train", "targets")
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


class ArrayDataset(BaseDataset):
    """Images in an array, N x H x W or N x H x W x 3 uint8, encoded losslessly as PNG when read."""

    def __init__(self, name: str, images: NDArray[np.uint8], labels: NDArray[np.integer]) -> None:
        if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
            images = images.transpose(0, 2, 3, 1)
        if images.ndim == 4 and images.shape[3] == 1:
            images = images[..., 0]
        if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)):
            raise UserError(
                f"{name}: images of shape {images.shape} and type {images.dtype}; "
                "they must be N x H x W or N x H x W x 3, uint8"
            )
        if labels.ndim != 1 or len(labels) != len(images) or not np.issubdtype(labels.dtype, np.integer):
            raise UserError(
                f"{name}: labels of shape {labels.shape} and type {labels.dtype} for {len(images)} images; "
                "there must be one integer for each"
            )
        if len(labels) and labels.min() < 0:
            raise UserError(f"{name}: label {labels.min()} of sample {int(labels.argmin())} is negative")
        if len(labels) and labels.max() > MAX_LABEL:
            raise UserError(
                f"{name}: label {labels.max()} of sample {int(labels.argmax())} is above {MAX_LABEL:,}, and no class number"
            )
        self.name = name
        self._images, self._labels = images, labels.astype(np.int64)
        self.counts = np.asarray([len(images)], dtype=np.int64)
        self.max_label = int(self._labels.max(initial=-1))

    def key(self, shard: int, sample: int) -> str:
        """See ``Dataset.key``; the number of the sample."""
        return f"{os.path.basename(self.name)}:{sample}"

    def label(self, shard: int, sample: int) -> int:
        """See ``Dataset.label``."""
        return self._number(int(self._labels[sample]), self.name)

    def read(self, shard: int, sample: int) -> Sample:
        """See ``Dataset.read``."""
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(self._images[sample])).save(buffer, "PNG")
        where = f"{self.name}: sample {sample}"
        return Sample(self.key(shard, sample), where, self.label(shard, sample), buffer.getvalue())


def read_idx(path: str) -> NDArray[Any]:
    """An IDX array (the format of MNIST), gzipped or not.

    Raises:
        UserError: not an IDX file, or cut short.
    """
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX_TYPES:
        raise UserError(f"{path}: not an IDX file")
    dtype, dimensions = np.dtype(_IDX_TYPES[data[2]]), data[3]
    start = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", data[4:start]) if len(data) >= start else ()
    if not shape or len(data) != start + dtype.itemsize * int(np.prod(shape, dtype=np.int64)):
        raise UserError(
            f"{path}: {len(data)} bytes do not hold an IDX array of shape {shape}; it was cut short"
        )
    return np.frombuffer(data, dtype=dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def labels_beside(images: str) -> str:
    """The IDX file of labels that lies beside one of images. Raises UserError where there is none."""
    for old, new in (("images-idx3", "labels-idx1"), ("images.idx3", "labels.idx1"), ("images", "labels")):
        if old in os.path.basename(images):
            name = os.path.basename(images).replace(old, new)
            found = os.path.join(os.path.dirname(images), name)
            if os.path.exists(found):
                return found
    raise UserError(f"{images}: no file of labels beside it; name it with --labels")


def read_npz(path: str) -> ArrayDataset:
    """The images and labels of an npz file. Raises UserError where it has not both, or cannot be read."""
    if not zipfile.is_zipfile(path):  # what numpy says of that is to load it unsafely
        raise UserError(f"{path}: not a readable npz file; it was cut short, or is something else")
    try:
        with np.load(path, allow_pickle=False) as file:
            images = next((name for name in _IMAGES if name in file), None)
            labels = next((name for name in _LABELS if name in file), None)
            if images is None or labels is None:
                raise UserError(
                    f"{path}: holds {', '.join(file.files) or 'nothing'}; "
                    f"it needs images ({'/'.join(_IMAGES)}) and labels ({'/'.join(_LABELS)})"
                )
            dataset = ArrayDataset(path, file[images], file[labels])
            if others := [name for name in file.files if name not in (images, labels)]:
                dataset.notes = (
                    f"{path}: {images} and {labels} are taken, and left out: {', '.join(others)}",
                )
            return dataset
    except UserError:
        raise
    except Exception as error:
        # Of damaged files zipfile, zlib and numpy raise a dozen types.
        raise UserError(f"{path}: not a readable npz file ({type(error).__name__}: {error})") from error
