"""COCO's run lengths of masks: columns from the left, each from the top; lengths of zeros and ones in turn, zeros first.

Lengths come as a list, or as a string (Lin et al., the COCO API's ``maskApi``): from the fourth on each length less the one two before it,
as a signed number of groups of 5 bits, the lowest first; a character is 48 + the group, + 32 where more follow.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def decode(
    counts: NDArray[np.int64] | Sequence[int], height: int, width: int, columns: slice | None = None
) -> NDArray[np.bool_]:
    """The mask, H x W, or these ``columns`` of it.

    Raises:
        ValueError: lengths that are negative, or do not add up to the mask's pixels.
    """
    runs = np.asarray(counts, dtype=np.int64)
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(
            f"run lengths of {int(runs.sum())} pixels, for a mask of {width} x {height} ({height * width})"
        )
    if columns is not None:
        first, width = columns.start, columns.stop - columns.start
        ends = (np.cumsum(runs) - first * height).clip(0, width * height)
        runs = np.diff(ends, prepend=0)
    ones = np.arange(len(runs)) % 2 == 1
    return np.repeat(ones, runs).reshape(width, height).T


def encode(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Run lengths of a mask, H x W."""
    flat = np.asarray(mask, dtype=np.bool_).ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    bounds = np.concatenate(([0], edges, [len(flat)]))
    runs = np.diff(bounds)
    return np.concatenate(([0], runs)) if len(flat) and flat[0] else runs


def encode_part(pixels: NDArray[np.bool_], top: int, left: int, height: int, width: int) -> NDArray[np.int64]:
    """Run lengths of a mask of ``height`` x ``width`` that is empty but for ``pixels``, whose upper left one is at (top, left).

    Only the columns of ``pixels`` are laid out.
    """
    columns = np.zeros((height, pixels.shape[1]), dtype=np.bool_)
    columns[top : top + pixels.shape[0]] = pixels
    if not columns.any():
        return np.asarray([height * width], dtype=np.int64)
    runs = encode(columns)
    runs[0] += left * height
    after = (width - left - pixels.shape[1]) * height
    if len(runs) % 2:
        runs[-1] += after
        return runs
    return np.concatenate((runs, [after])) if after else runs


def from_string(text: str | bytes) -> NDArray[np.int64]:
    """Run lengths of the compressed form.

    Raises:
        ValueError: a character that cannot be, or an unfinished number.
    """
    try:
        data = text.encode("ascii") if isinstance(text, str) else text
    except UnicodeEncodeError as error:
        raise ValueError(f"compressed run lengths with {text[error.start]!r}") from error
    groups = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - 48
    if not len(groups):
        return groups
    if ((groups < 0) | (groups > 63)).any() or groups[-1] & 32:
        raise ValueError(
            f"compressed run lengths that begin with {data[:20]!r} and are none, or are cut short"
        )
    last = (groups & 32) == 0
    number = np.concatenate(([0], np.cumsum(last)[:-1]))
    first = np.concatenate(([0], np.flatnonzero(last)[:-1] + 1))
    place = np.arange(len(groups)) - first[number]
    if place.max() > 9:
        raise ValueError("compressed run lengths with a number of more than 50 bits")
    values = np.zeros(int(number[-1]) + 1, dtype=np.int64)
    np.add.at(values, number, (groups & 31) << (5 * place))
    # The highest bit of the last group is the sign.
    negative = (groups[last] & 16) != 0
    values[negative] -= np.int64(1) << (5 * (place[last][negative] + 1))
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def to_string(counts: NDArray[np.int64] | Sequence[int]) -> str:
    """The compressed form of run lengths."""
    runs = [int(count) for count in counts]
    text = bytearray()
    for i, run in enumerate(runs):
        rest = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            group = rest & 31
            rest >>= 5
            more = rest != (-1 if group & 16 else 0)
            text.append(group + 48 + (32 if more else 0))
    return text.decode("ascii")
