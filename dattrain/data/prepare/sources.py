"""What ``data pack`` reads: an image folder, a list file, IDX or npz arrays, ImageNet's class tars, or shards.

Each is a ``Dataset``; a source adds names of its classes where it knows them.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dattrain.data.source.class_tars import ClassTars, find
from dattrain.data.source.dataset import open_dataset
from dattrain.data.source.fields import Relabelled
from dattrain.data.source.folders import read_file
from dattrain.data.source.index import MAX_LABEL
from dattrain.data.source.listing import is_remote
from dattrain.data.source.sample import Dataset, Numbered, Sample
from dattrain.errors import UserError

_IMAGES, _LABELS = ("images", "x", "x_train", "data"), ("labels", "y", "y_train", "targets")
_COLUMNS = frozenset(
    {"label", "labels", "class", "class_id", "class_name", "classes", "category", "target", "y"}
)
_UTF16 = ("\udcff\udcfe", "\udcfe\udcff")
"""Its byte order marks, as UTF-8 reads them."""
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


class ListDataset(Numbered):
    """A text file with a path and a label on each line, apart by tab, comma or the last space.

    Paths are relative to the list's folder, or to ``root``. Labels are integers (``3`` or ``3.0``), or names of classes,
    which are numbered in sorted order. A first line of column names (``path,label``) is passed over, and noted. In a .csv or
    .tsv, fields may stand in double quotes (RFC 4180, within one line).

    Raises:
        UserError: a line that is no path and label, or no UTF-8 text; integers and names in one list; a negative label; a file with two labels.
    """

    def __init__(self, path: str, root: str | None = None) -> None:
        self.name = path
        self.root = Path(root if root is not None else os.path.dirname(path) or ".")
        self.prefetches = False
        rows, comments = _rows(path)
        if comments:
            self.notes = (f"{path}: {comments} lines that begin with # passed over",)
        if rows and _is_header(rows[0], self.root):
            self.notes = (
                *self.notes,
                f"{path}, line {rows[0][0]}: taken for column names, not for a sample",
            )
            rows = rows[1:]
        if not rows:
            raise UserError(f"{path}: names no images")
        _check_columns(path, rows[0], self.root)
        _check_once(path, rows, self.root)
        numbers = [_integer(path, line, word) for line, _, word in rows]
        if None not in numbers:
            labels = [number for number in numbers if number is not None]
            for (line, _, word), label in zip(rows, labels):
                if label < 0:
                    raise UserError(
                        f"{path}, line {line}: label {word} is negative; classes are numbered from 0"
                    )
                if label > MAX_LABEL:
                    raise UserError(
                        f"{path}, line {line}: label {word} is above {MAX_LABEL:,}, and no class number"
                    )
        elif all(number is None for number in numbers):
            self.classes = sorted({word for _, _, word in rows})
            number_of = {name: i for i, name in enumerate(self.classes)}
            labels = [number_of[word] for _, _, word in rows]
            self._check_files(rows)
        else:
            # Which kind is meant is told by the majority, and the first line that is of the other kind is named.
            named = sum(number is None for number in numbers)
            odd = 2 * named < len(numbers)
            at = next(i for i, number in enumerate(numbers) if (number is None) == odd)
            line, _, word = rows[at]
            raise UserError(
                f"{path}, line {line}: label {word!r} is {'no integer' if odd else 'an integer'}, unlike those of most "
                f"other lines ({len(numbers) - named} of {len(numbers)} are integers); a list has either numbers or names"
            )
        self._names = [name for _, name, _ in rows]
        self._labels = np.asarray(labels, dtype=np.int64)
        self.counts = np.asarray([len(rows)], dtype=np.int64)
        self.max_label = int(self._labels.max())

    def _check_files(self, rows: Sequence[tuple[int, str, str]]) -> None:
        """Refuse a class none of whose files is there: it is no class (a header, a name with spaces), and would shift the
        numbers of the others."""
        first: dict[str, tuple[int, str]] = {}
        there: set[str] = set()
        for line, name, word in rows:
            first.setdefault(word, (line, name))
            if word not in there and (self.root / name).exists():
                there.add(word)
        for word, (line, name) in first.items():
            if word not in there:
                raise UserError(
                    f"{self.name}, line {line}: class {word!r} has no file that is there ({self.root / name}); remove the line if it "
                    "is no sample; paths with spaces want a tab or comma before the label, and --root says where paths begin"
                )

    def key(self, shard: int, sample: int) -> str:
        """See ``Dataset.key``."""
        return f"{os.path.basename(self.name)}:{self._names[sample]}"

    def label(self, shard: int, sample: int) -> int:
        """See ``Dataset.label``."""
        return self._number(int(self._labels[sample]), self.name)

    def read(self, shard: int, sample: int) -> Sample:
        """See ``Dataset.read``."""
        path = self.root / self._names[sample]
        data = read_file(path, f" (from {self.name})")
        return Sample(self.key(shard, sample), str(path), self.label(shard, sample), data)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Nothing to fetch."""

    def close(self) -> None:
        """Nothing to close."""


def _rows(path: str) -> tuple[list[tuple[int, str, str]], int]:
    """Line number, path and label of each line of a list; and how many lines are comments."""
    rows, comments = [], 0
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                if "\0" in line or line.startswith(_UTF16):
                    raise UserError(
                        f"{path}, line {number}: is UTF-16, or no text; a list must be UTF-8 (`iconv -f UTF-16 -t UTF-8`)"
                    )
                line = line.strip()
                comments += line.startswith("#")
                if not line or line.startswith("#"):
                    continue
                rows.append((number, *_fields(f"{path}, line {number}", line, _is_table(path))))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return rows, comments


def _is_table(path: str) -> bool:
    return path.lower().endswith((".csv", ".tsv"))


def _fields(where: str, line: str, table: bool) -> tuple[str, str]:
    """Path and label of a line; ``table`` says that fields may stand in quotes."""
    delimiter = "\t" if "\t" in line else ","
    if table and re.search(rf'(^|{delimiter})\s*"', line):
        try:
            (row,) = csv.reader([line], delimiter=delimiter, skipinitialspace=True, strict=True)
        except csv.Error as error:
            raise UserError(f"{where}: {line!r}: its quotes do not match ({error})") from error
        found = [field.strip() for field in row]
        if len(found) != 2 or not all(found):
            raise UserError(
                f"{where}: {line!r} has {len(found)} columns; a list has a path and a label alone, apart by a comma or tab "
                "outside of quotes"
            )
        return found[0], found[1]
    match = re.fullmatch(r"(.+?)\s*[\t,]\s*([^\t,]+)", line) or re.fullmatch(r"(.+)\s+(\S+)", line)
    if match is None:
        raise UserError(f"{where}: {line!r} is not a path and a label")
    doubled = line.count('"') > 1  # a single one may be inches
    if any(re.fullmatch(r"'.+'|\".+|.+\"" if doubled else "'.+'", field) for field in match.groups()):
        raise UserError(
            f"{where}: {line!r} has quotes, which would be part of the name; take them away"
            + ("" if table else ", or call the list .csv where they are double ones with a comma between")
        )
    return match[1], match[2]


def _check_columns(path: str, row: tuple[int, str, str], root: Path) -> None:
    """Refuse a table of more columns: the last one is not its label."""
    line, name, word = row
    columns = re.split(r"\s*[\t,]\s*", name)
    if len(columns) > 1 and not (root / name).exists() and any((root / each).is_file() for each in columns):
        raise UserError(
            f"{path}, line {line}: {len(columns) + 1} columns, the last of them {word!r}; a list has a path and a label alone"
        )


def _check_once(path: str, rows: Sequence[tuple[int, str, str]], root: Path) -> None:
    """Refuse a file with two labels, however its path is spelled: one of them is wrong, or a class of its own is meant."""
    first: dict[str, tuple[int, str]] = {}
    folder = os.path.abspath(root)
    for line, name, word in rows:
        before, label = first.setdefault(os.path.normpath(os.path.join(folder, name)), (line, word))
        if label != word:
            raise UserError(
                f"{path}, line {line}: {name} has label {word!r}, and {label!r} in line {before}; an image has one class"
            )


def _is_header(row: tuple[int, str, str], root: Path) -> bool:
    """Whether a first line has names of columns instead of a sample."""
    _, name, word = row
    return word.lower() in _COLUMNS and not (root / name).exists()


def _integer(path: str, line: int, word: str) -> int | None:
    """``3``, ``-1``, ``3.0`` and ``3e0`` (what tables make of integers) as an integer; None for a name.

    Raises:
        UserError: a number that is not whole.
    """
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", word):
        return None
    if re.fullmatch(r"[+-]?[0-9]{1,4000}", word):
        return int(word)
    value = float(word)
    if not value.is_integer():
        raise UserError(f"{path}, line {line}: label {word} is no whole number, and so no class")
    return int(value)


class ArrayDataset(Numbered):
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
        self.prefetches = False

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

    def prefetch(self, shards: Sequence[int]) -> None:
        """Nothing to fetch."""

    def close(self) -> None:
        """Nothing to close."""


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
            return _from_npz(path)
        if re.search(r"idx[0-9]-ubyte(\.gz)?$|\.idx3?(\.gz)?$", path):
            return ArrayDataset(path, read_idx(path), read_idx(labels or _labels_beside(path)))
        if re.search(r"\.(txt|csv|tsv|lst|list)$", path):
            return ListDataset(path, root)
    tars = find(path)
    return open_dataset(path) if tars is None else ClassTars(path, tars, jobs=jobs)


def read_idx(path: str) -> NDArray:
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


def _labels_beside(images: str) -> str:
    for old, new in (("images-idx3", "labels-idx1"), ("images.idx3", "labels.idx1"), ("images", "labels")):
        if old in os.path.basename(images):
            name = os.path.basename(images).replace(old, new)
            found = os.path.join(os.path.dirname(images), name)
            if os.path.exists(found):
                return found
    raise UserError(f"{images}: no file of labels beside it; name it with --labels")


def _from_npz(path: str) -> ArrayDataset:
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
