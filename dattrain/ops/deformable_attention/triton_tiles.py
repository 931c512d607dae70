"""How the ``triton`` backend's work is divided: patches of queries and tiles of keys, tiles of the table, and pieces that fit memory.

Tiles, warps and limits of registers are what an H100 was fastest with, where one was asked (docs/benchmarks/h100.md).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dattrain.ops.deformable_attention.coordinates import Geometry

SCORES_BYTES = 512 << 20
"""Bytes of the scores' gradient, at most, at a time; of one tile of keys of one head where that is more."""
SPLITS = 1024
"""Programs, about, that the (image, key) pairs of a table's gradient are spread over."""
KEY_TILE = 64


class Tiles(NamedTuple):
    """Patches of ``S`` sub-tiles of R rows and C columns of queries, times BLOCK_K keys."""

    H: int
    W: int
    """Of the map, compiled into the kernels; 0 where it is not."""
    R: int
    C: int
    S: int
    BLOCK_K: int
    num_warps: int
    registers: int | None = None
    """Of a thread, at most, so that a multiprocessor holds one block more."""

    def patches(self, geometry: Geometry) -> tuple[int, int]:
        """How many cover a map, down and across."""
        return triton.cdiv(geometry.height, self.R * self.S), triton.cdiv(geometry.width, self.C)

    def places(self, geometry: Geometry) -> int:
        """Queries in them, those past the map included."""
        down, across = self.patches(geometry)
        return down * across * self.R * self.C * self.S

    @property
    def patch(self) -> dict[str, int]:
        """Constants of it and of the map."""
        return {"H": self.H, "W": self.W, "R": self.R, "C": self.C, "S": self.S}

    def tail(self, keys: int) -> int:
        """Size of the tile for the keys past the last full one, 0 for none."""
        return power(keys % self.BLOCK_K) if keys % self.BLOCK_K else 0

    def launches(self, keys: int) -> list[tuple[int, int, int]]:
        """(first key, tiles, keys per tile): full tiles, then what is left over."""
        whole, rest = keys // self.BLOCK_K, self.tail(keys)
        runs = [(0, whole, self.BLOCK_K), (whole * self.BLOCK_K, int(rest > 0), rest)]
        return [run for run in runs if run[1]]

    def launch(self, block: int | None = None) -> dict[str, int]:
        """Constants of a launch; a smaller tile of keys takes fewer warps."""
        block = block or self.BLOCK_K
        warps = max(1, self.num_warps * block // self.BLOCK_K)
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {**self.patch, "BLOCK_K": block, "num_warps": warps, "num_stages": 1, **limit}


def forward_tiles(q: Tensor, table: Tensor | None, geometry: Geometry) -> Tiles:
    """Of the queries' map."""
    constants = (*_constant_size(table, geometry), *_patch(geometry.width))
    if q.element_size() == 2:
        return Tiles(*constants, S=4, BLOCK_K=32, num_warps=4, registers=_at_most(80, q))
    narrow = q.shape[-1] <= 32
    return Tiles(*constants, S=2 if narrow else 1, BLOCK_K=32 if narrow else 16, num_warps=4)


def backward_tiles(q: Tensor, table: Tensor | None, geometry: Geometry) -> Tiles:
    """The same for backward."""
    constants = (*_constant_size(table, geometry), *_patch(geometry.width))
    some = 2 if q.shape[-1] <= 32 else 1
    return Tiles(*constants, S=some, BLOCK_K=KEY_TILE, num_warps=4, registers=_at_most(168, q))


def _constant_size(table: Tensor | None, geometry: Geometry) -> tuple[int, int]:
    """A table of the map's own size says that there is one size, and kernels made for it take fewer instructions.

    A table that is stretched over the map is read by images of all sizes, for each of which all kernels would be compiled.
    """
    size = geometry.height, geometry.width
    return size if table is not None and table.shape[1:] == tuple(2 * n - 1 for n in size) else (0, 0)


class TableTiles(NamedTuple):
    """A tile of the table's gradient, for some heads together, and the tiles that a map of queries is read in."""

    TILE_Y: int
    TILE_X: int
    ROWS: int
    COLUMNS: int
    CUT: bool
    """Whether a map is several of these."""
    PACK: int
    """Keys that share a tile of queries."""
    TOGETHER: int
    num_warps: int
    registers: int | None
    tiles: int
    """Of the table."""

    @classmethod
    def of(cls, table: Tensor, geometry: Geometry, shared: int, q: Tensor) -> TableTiles:
        """``shared``: heads that have the same positions."""
        half = q.element_size() == 2
        tile_y, tile_x = (min(128 if half else 32, power(n)) for n in table.shape[1:])
        tile = max(tile_y, tile_x)
        rows, columns = (_cut(n, 64 if half and tile > 32 else 32) for n in (geometry.height, geometry.width))
        # As many heads as share positions and fit into registers; warps and programs as an H100 was fastest with, up to 64.
        heads = (4 if tile <= 32 else 2 if tile <= 64 else 1) if half else 2
        together = max(n for n in range(1, heads + 1) if shared % n == 0)
        cut = rows < geometry.height or columns < geometry.width
        limited = tile == 64 and together > 1 and capability(q.device) == 9
        return cls(
            tile_y, tile_x, rows, columns, CUT=cut,
            PACK=2 if max(geometry.height, geometry.width) <= 8 else 1, TOGETHER=together,
            num_warps=8 if tile > 64 else 4 if tile > 32 else 1 if half and not cut else 2,
            registers=(128 if rows * columns <= 1024 else 168) if limited else None,
            tiles=triton.cdiv(table.shape[1], tile_y) * triton.cdiv(table.shape[2], tile_x),
        )  # fmt: skip

    def cuts(self, geometry: Geometry) -> tuple[int, int]:
        """Tiles of a map, down and across."""
        return triton.cdiv(geometry.height, self.ROWS), triton.cdiv(geometry.width, self.COLUMNS)

    def splits(self, units: int, heads: int) -> int:
        """Parts that the sum over all units is made in."""
        programs = SPLITS * self.TOGETHER
        programs = programs * 2 if self.TILE_X <= 16 else programs // 2 if self.num_warps > 4 else programs
        return max(1, min(units, programs // heads))

    def launch(self) -> dict[str, Any]:
        """Constants of a launch."""
        constants = self._asdict()
        del constants["tiles"], constants["registers"]
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {**constants, "num_stages": 1, **limit}


class Piece(NamedTuple):
    """What of a call is worked on at a time: some images; or some heads, of one image; or some keys, of one head of one image."""

    images: slice
    heads: slice
    groups: slice
    key: slice

    @property
    def queries(self) -> tuple[slice, slice]:
        """Of a tensor B x heads x queries x ..."""
        return self.images, self.heads

    @property
    def keys(self) -> tuple[slice, slice, slice]:
        """Of a tensor B x heads x keys x ..."""
        return self.images, self.heads, self.key

    @property
    def positions(self) -> tuple[slice, slice, slice]:
        """Of a tensor B x groups x keys x ..."""
        return self.images, self.groups, self.key


def pieces(batch: int, heads: int, groups: int, keys: int, key_bytes: int) -> list[Piece]:
    """In which the scores' gradient, ``key_bytes`` for a key of a head, takes no more than ``SCORES_BYTES``: the first is the largest.

    Heads of a piece are whole groups or of one group; of keys, of heads and of images only one is divided.
    """
    share = heads // groups
    fits = keys * key_bytes <= SCORES_BYTES
    some_keys = keys if fits else min(keys, max(1, SCORES_BYTES // key_bytes // KEY_TILE) * KEY_TILE)
    some_heads = min(heads, max(1, SCORES_BYTES // (keys * key_bytes)))
    some_heads -= some_heads % share if some_heads > share else 0
    some_images = min(batch, max(1, SCORES_BYTES // (heads * keys * key_bytes)))
    return [
        Piece(
            slice(image, min(image + some_images, batch)),
            slice(head, last),
            slice(head // share, (last - 1) // share + 1),
            slice(key, min(key + some_keys, keys)),
        )
        for image in range(0, batch, some_images)
        for run in range(0, heads, max(some_heads, share))
        for head in range(run, min(run + max(some_heads, share), heads), some_heads)
        for last in [min(head + some_heads, run + max(some_heads, share), heads)]
        for key in range(0, keys, some_keys)
    ]


def _at_most(registers: int, q: Tensor) -> int | None:
    """A limit that was chosen by the clock on compute capability 9.0 holds there: on 8.x, for one, forward spills with it."""
    return registers if q.element_size() == 2 and q.shape[-1] <= 32 and capability(q.device) == 9 else None


def capability(device: torch.device) -> int:
    """Compute capability, the major number; 0 in the interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _patch(width: int) -> tuple[int, int]:
    # 7, 24, 56: columns of 8 waste less than columns of 16.
    return (2, 8) if width % 16 in range(1, 9) else (1, 16)


def _cut(n: int, most: int) -> int:
    """Side of the tiles that ``n`` queries are read in: one, or those whose padding, and hats and products, come to least."""
    sides = [side for side in (64, 32, 16) if side <= most]
    return power(n) if n <= most else min(sides, key=lambda side: triton.cdiv(n, side) * (side + 16))


def power(n: int) -> int:
    """The least power of two that a matrix product takes."""
    return max(16, int(triton.next_power_of_2(n)))
