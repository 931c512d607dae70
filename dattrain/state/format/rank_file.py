"""One rank's file of a checkpoint: a safetensors file with a checksum for every mebibyte.

The file is laid out in host memory exactly as it will lie on the disk, so that saving is one copy out of the device and
one sequential write. Checksums are per block rather than per file so that whoever reads a part of a file, a few tensors or
the header, can check what it reads without reading the rest.

They are CRC-32, as in file systems and archives: what they are for is disks, networks and writes that were cut short, and a
block that was changed by any of these passes once in 4 billion times, a flipped bit or a burst of up to 32 never. zlib
computes 6.9 GB/s on one core of the machine where this was written; SHA-256, even with the CPU's own instructions, 2.0, and
there the disk took 4: saving reached half its speed. Whoever can write the folder could write matching sums of any kind.

No torch here: ``dattrain ckpt ls`` and ``verify`` start quickly.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import stat
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dattrain.errors import Damaged
from dattrain.files import doing

BLOCK = 1 << 20
"""Bytes under one checksum."""
PAGE = 4096
"""Alignment that unbuffered writes ask for; the header is padded to it."""
CHUNK = 16 * BLOCK
"""Bytes handed to the kernel at once."""
_HEADER_LIMIT = 256 << 20
_BLOCKS_KEPT = 2
_DTYPE_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True)
class Piece:
    """A tensor of a rank file: elements ``[start, start + numel)`` of ``state`` of the parameter (or buffer) ``name``.

    Fragments of weights, moments and averages are flat and ``F32``; a buffer is not cut, and of its own dtype and shape.
    """

    state: str
    name: str
    start: int
    numel: int
    dtype: str = "F32"
    shape: tuple[int, ...] | None = None

    @property
    def key(self) -> str:
        """The tensor's name in the safetensors file."""
        return f"{self.state}/{self.start}/{self.name}"

    @property
    def nbytes(self) -> int:
        """Size of its data in bytes."""
        return self.numel * _DTYPE_BYTES[self.dtype]

    @classmethod
    def parse(cls, key: str, dtype: str, shape: Sequence[int]) -> Piece:
        """The piece that ``key`` names. Raises Damaged if the key is not one of ours."""
        try:
            state, start, name = key.split("/", 2)
            sides = tuple(int(side) for side in shape)
            if dtype not in _DTYPE_BYTES:
                raise ValueError(dtype)
            own_shape = sides if state == "buffer" else None
            return cls(state, name, int(start), math.prod(sides), dtype, own_shape)
        except (ValueError, TypeError) as e:
            raise Damaged(f"holds a tensor {key!r} of dtype {dtype!r} that this format does not know") from e


@dataclass(frozen=True)
class Layout:
    """Where each piece lies in the file: ``offsets[i]`` is the absolute byte of ``pieces[i]``; ``size`` that of the file."""

    header: bytes
    pieces: tuple[Piece, ...]
    offsets: tuple[int, ...]
    size: int


def layout(pieces: Iterable[Piece]) -> Layout:
    """Lay ``pieces`` out, wide elements first so that every one is aligned, behind a header padded to a page."""
    ordered = tuple(sorted(pieces, key=lambda p: -_DTYPE_BYTES[p.dtype]))
    table: dict[str, Any] = {}
    relative, position = [], 0
    for piece in ordered:
        relative.append(position)
        shape = [piece.numel] if piece.shape is None else list(piece.shape)
        table[piece.key] = {
            "dtype": piece.dtype,
            "shape": shape,
            "data_offsets": [position, position + piece.nbytes],
        }
        position += piece.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    padded = -(-(8 + len(text)) // PAGE) * PAGE
    header = (padded - 8).to_bytes(8, "little") + text.ljust(padded - 8)
    return Layout(header, ordered, tuple(padded + r for r in relative), padded + position)


@dataclass(frozen=True)
class Digest:
    """Size of a file, of its header, and the CRC-32 of every ``BLOCK`` bytes from its beginning, 8 hex digits each."""

    size: int
    header: int
    blocks: str

    def block(self, index: int) -> str:
        """The checksum of one block."""
        return self.blocks[8 * index : 8 * index + 8]

    def to_json(self) -> dict[str, Any]:
        """The digest as a manifest has it."""
        return {"size": self.size, "header": self.header, "crc32_per_mib": self.blocks}

    @classmethod
    def from_json(cls, data: Any) -> Digest:
        """The reverse of ``to_json``. Raises Damaged when it cannot be one."""
        try:
            digest = cls(int(data["size"]), int(data["header"]), str(data["crc32_per_mib"]))
        except (KeyError, TypeError, ValueError) as e:
            raise Damaged("describes a file without size, header or checksums") from e
        if len(digest.blocks) != 8 * -(-digest.size // BLOCK) or not 8 <= digest.header <= digest.size:
            raise Damaged("describes a file whose checksums do not fit its size")
        return digest


def write(path: Path, image: memoryview, header: int, *, direct: bool = True) -> Digest:
    """Write ``image`` (all of the file) to a new file and put it on the disk; checksums are computed beside the writing.

    ``direct`` goes around the page cache where the file system and the image's alignment allow it: a checkpoint is never
    read back soon, and the cache is better left to the training data.

    Raises:
        OSError: the file exists, or could not be written.
    """
    size = len(image)
    fd, unbuffered = _create(path, direct and _aligned(image))
    try:
        with ThreadPoolExecutor(1, "checkpoint-sums") as pool:
            sums = pool.submit(checksums, image)  # zlib works outside the interpreter lock
            position = 0
            while position < size:
                end = min(position + CHUNK, size)
                if unbuffered and (position % PAGE or end - position < PAGE):
                    unbuffered = _buffered(fd)  # what is left is less than a page
                if unbuffered:
                    end -= (end - position) % PAGE
                try:
                    position += os.write(fd, image[position:end])
                except OSError as e:
                    if not unbuffered or e.errno != errno.EINVAL:
                        raise
                    unbuffered = _buffered(fd)  # the flag was taken, but the file system cannot
            with doing(f"syncing (fsync) {path.name}"):
                os.fsync(fd)
            return Digest(size, header, sums.result())
    finally:
        os.close(fd)


def _buffered(fd: int) -> bool:
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
    return False


def checksums(image: memoryview) -> str:
    """``checksum`` of every ``BLOCK`` bytes of ``image``, one after another."""
    return "".join(checksum(image[at : at + BLOCK]) for at in range(0, len(image), BLOCK))


def checksum(block: memoryview | bytes | bytearray) -> str:
    """CRC-32 (zlib's) in 8 hex digits."""
    return f"{zlib.crc32(block):08x}"


def _aligned(image: memoryview) -> bool:
    import ctypes

    return not image.readonly and ctypes.addressof(ctypes.c_char.from_buffer(image)) % PAGE == 0


def _create(path: Path, direct: bool) -> tuple[int, bool]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    if direct and hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, flags | os.O_DIRECT, 0o644), True
        except OSError as e:
            if e.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
            path.unlink(missing_ok=True)  # some file systems create the file before they refuse the flag
    return os.open(path, flags, 0o644), False


Pieces = dict[tuple[str, str], list[tuple[Piece, int]]]
"""What a rank file holds of each (state, name): pieces, and the absolute byte where each begins."""


class Reader:
    """Reads byte ranges of one rank file, checking every block that it touches; keeps the last blocks it read.

    Raises Damaged, naming the file, for whatever is not as it was written. Not thread-safe.
    """

    def __init__(self, path: Path, digest: Digest, *, verify: bool = True) -> None:
        self.path, self.digest, self.verify = path, digest, verify
        self._blocks: OrderedDict[int, bytearray] = OrderedDict()
        self._fd = open_regular(path, digest.size)
        self._table: Pieces | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def pieces(self) -> Pieces:
        """Every (state, name)'s pieces in this file and the absolute byte where each begins."""
        if self._table is None:
            self._table = self._parse(self.read(0, self.digest.header))
        return self._table

    def _parse(self, header: bytearray) -> Pieces:
        length = int.from_bytes(header[:8], "little")
        if length + 8 != self.digest.header or length > _HEADER_LIMIT:
            raise Damaged(
                f"{self.path.name}: its header is {length} bytes long where the manifest says otherwise"
            )
        try:
            table = json.loads(header[8:])
            found: Pieces = {}
            for key, entry in table.items():
                if key == "__metadata__":
                    continue
                piece = Piece.parse(key, entry["dtype"], entry["shape"])
                begin, end = entry["data_offsets"]
                if not 0 <= begin <= end <= self.digest.size - len(header) or end - begin != piece.nbytes:
                    raise Damaged(f"{self.path.name}: tensor {key!r} lies outside the file")
                found.setdefault((piece.state, piece.name), []).append((piece, len(header) + begin))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise Damaged(f"{self.path.name}: its header cannot be read ({e})") from e
        return found

    def read(self, offset: int, size: int) -> bytearray:
        """``size`` bytes from ``offset``, checked."""
        first, last = offset // BLOCK, (offset + size - 1) // BLOCK
        if size == 0:
            return bytearray()
        if first == last:
            begin = offset - first * BLOCK
            return self.block(first)[begin : begin + size]
        parts = []
        for index in range(first, last + 1):
            block = self.block(index)
            begin = max(0, offset - index * BLOCK)
            parts.append(block[begin : offset + size - index * BLOCK])
        return bytearray().join(parts)

    def block(self, index: int) -> bytearray:
        """All of one block, checked. Whoever gets it must not change it."""
        block = self._blocks.get(index)
        if block is None:
            block = read_block(self._fd, self.path, self.digest, index, verify=self.verify)
            self._blocks[index] = block
            if len(self._blocks) > _BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        else:
            self._blocks.move_to_end(index)
        return block


def open_regular(path: Path, size: int) -> int:
    """A descriptor of ``path``, which must be an ordinary file (no link) of ``size`` bytes. Raises Damaged."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as e:
        raise Damaged(f"{path.name}: {'missing' if e.errno == errno.ENOENT else e.strerror}") from e
    try:
        _require(path, os.fstat(fd), size)
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_regular(path: Path, size: int) -> None:
    """``open_regular`` without opening. Raises Damaged."""
    try:
        status = os.lstat(path)
    except OSError as e:
        raise Damaged(f"{path.name}: {'missing' if e.errno == errno.ENOENT else e.strerror}") from e
    _require(path, status, size)


def _require(path: Path, status: os.stat_result, size: int) -> None:
    regular = stat.S_ISREG(status.st_mode)
    if not regular or status.st_size != size:
        what = f"{status.st_size} bytes, not {size}" if regular else "not an ordinary file"
        raise Damaged(f"{path.name}: {what}")


def read_block(fd: int, path: Path, digest: Digest, index: int, *, verify: bool = True) -> bytearray:
    """Block ``index`` of an open rank file, checked against its checksum. Raises Damaged."""
    begin = index * BLOCK
    block = bytearray(min(BLOCK, digest.size - begin))
    view, done = memoryview(block), 0
    while done < len(block):
        try:
            got = os.preadv(fd, [view[done:]], begin + done)
        except OSError as e:
            raise Damaged(f"{path.name}: {e.strerror} at byte {begin + done}") from e
        if not got:
            raise Damaged(f"{path.name}: ends at byte {begin + done}")
        done += got
    if verify and checksum(block) != digest.block(index):
        raise Damaged(f"{path.name}: bytes {begin}-{begin + len(block) - 1} do not have their checksum")
    return block
