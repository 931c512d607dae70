"""A counter-based random generator, vectorised over keys: every draw is a pure function of (seed, stream, position).

Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC'11), written with numpy so that the
draws of a whole batch cost a few array operations, and so that they do not change with numpy's version, as the
streams of ``numpy.random.Generator`` may.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

Words = NDArray[np.uint64]

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


class Stream(IntEnum):
    """Independent streams of one seed. The numbers are part of the format: a change alters every run."""

    SHARDS = 1
    WINDOW = 2
    CROP = 3
    FLIP = 4
    OPS = 5
    JITTER = 6
    ERASE = 7
    MIX = 8
    DROP_PATH = 9
    PACK = 10
    DENSE_SCALE = 11
    DENSE_CROP = 12
    DENSE_FLIP = 13
    DISTORTION = 14
    SHORT_SIDE = 15
    PRECROP = 16
    PASTE = 17
    PASTED = 18


def philox4x32(
    c0: ArrayLike, c1: ArrayLike, c2: ArrayLike, c3: ArrayLike, *, key: int
) -> tuple[Words, Words, Words, Words]:
    """Four arrays of random 32-bit words (held in uint64) for the broadcast counters (32-bit) and the 64-bit ``key``."""
    x0, x1, x2, x3 = np.broadcast_arrays(*(np.asarray(c, dtype=np.uint64) for c in (c0, c1, c2, c3)))
    k0, k1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = x0 * _M0, x2 * _M1
        x0, x2 = (p1 >> _SHIFT) ^ x1 ^ np.uint64(k0), (p0 >> _SHIFT) ^ x3 ^ np.uint64(k1)
        x1, x3 = p1 & _LOW, p0 & _LOW
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return x0, x1, x2, x3


def words(seed: int, stream: int, position: ArrayLike, count: int) -> Words:
    """``count`` random 32-bit words per position: B x count, uint64. ``position`` is B non-negative int64."""
    at = np.asarray(position, dtype=np.int64).astype(np.uint64).reshape(-1, 1)
    blocks = np.arange(-(-count // 4), dtype=np.uint64)[None, :]
    four = philox4x32(blocks, at & _LOW, at >> _SHIFT, np.uint64(stream), key=seed)
    return np.stack(four, axis=-1).reshape(at.shape[0], 4 * blocks.shape[1])[:, :count]


def uniform(seed: int, stream: int, position: ArrayLike, count: int) -> NDArray[np.float64]:
    """Uniform draws in the open interval (0, 1): B x count, float64, of 32 random bits each."""
    return (words(seed, stream, position, count).astype(np.float64) + 0.5) * 2.0**-32


def uniform32(seed: int, stream: int, position: ArrayLike, count: int) -> NDArray[np.float32]:
    """Uniform draws in [0, 1): B x count, float32, of 24 random bits each."""
    return (words(seed, stream, position, count) >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)


def normal(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard normal draws from two arrays of uniform draws (Box and Muller 1958)."""
    return np.sqrt(-2.0 * np.log(u)) * np.cos(2.0 * np.pi * v)
