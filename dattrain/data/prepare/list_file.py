"""A list of images: a text file with a path and a label on each line."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dattrain.data.source.files import explained
from dattrain.data.source.image_files import ImageFiles
from dattrain.data.source.index import MAX_LABEL
from dattrain.errors import UserError

_COLUMNS = frozenset(
    {"label", "labels", "class", "class_id", "class_name", "classes", "category", "target", "y"}
)
_UTF16 = ("\udcff\udcfe", "\udcfe\udcff")
"""Its byte order marks, as UTF-8 reads them."""


class ListDataset(ImageFiles):
    """A text file with a path and a label on each line, apart by tab, comma or the last space.

    Paths are relative to the list's folder, or to ``root``. Labels are integers (``3`` or ``3.0``), or names of classes,
    which are numbered in sorted order. A first line of column names (``path,label``) is skipped, and noted. In a .csv or
    .tsv, fields may stand in double quotes (RFC 4180, within one line).

    Raises:
        UserError: a line that is no path and label, or no UTF-8 text; integers and names in one list; a negative label; a file with two labels.
    """

    def __init__(self, path: str, root: str | None = None) -> None:
        self.name = path
        self.root = Path(root if root is not None else os.path.dirname(path) or ".")
        rows, comments = _rows(path)
        if comments:
            self.notes = (f"{path}: {comments} lines that begin with # skipped",)
        if rows and _is_header(rows[0], self.root):
            self.notes = (*self.notes, f"{path}, line {rows[0][0]}: taken for column names, not for a sample")
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
        super().__init__(path, self.root, np.asarray(labels, dtype=np.int64), origin=f" (from {path})")

    def _check_files(self, rows: Sequence[tuple[int, str, str]]) -> None:
        """Refuse a class none of whose files is there.

        It is no class (a header, a name with spaces), and would shift the numbers of the others.
        """
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

    def file(self, sample: int) -> str:
        """See ``ImageFiles.file``."""
        return self._names[sample]


def _rows(path: str) -> tuple[list[tuple[int, str, str]], int]:
    """Line number, path and label of each line of a list; and how many lines are comments."""
    rows, comments = [], 0
    with explained(path), open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
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
