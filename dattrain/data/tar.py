"""Reading and writing the tar format as WebDataset shards use it: a scan of headers alone, and plain members.

``tarfile`` reads a member's header through several Python objects; a shard of 14 million samples has 42 million
members, so the scan here touches the 512 bytes that it needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from dattrain.errors import UserError

BLOCK = 512
_REGULAR = (b"0", b"\0", b"7")


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar: its name, and where its bytes are."""

    name: str
    offset: int
    size: int


def member_size(header: bytes) -> int:
    """Size field of a header: octal, or base 256 for large members. Raises ValueError for a broken header."""
    checksum = int(header[148:156].rstrip(b"\0 ") or b"0", 8)
    if checksum != sum(header[:148]) + 8 * 32 + sum(header[156:BLOCK]):
        raise ValueError("checksum of the header")
    field = header[124:136]
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.rstrip(b"\0 ") or b"0", 8)


def member_name(header: bytes) -> str:
    """Name in a header, with the prefix of the POSIX format."""
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        if prefix:
            name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def scan(path: str, *, unterminated: bool = False) -> Iterator[Member]:
    """Regular members of a tar, by reading its headers alone.

    Args:
        unterminated: accept a tar without its end marker, as a writer that was killed leaves it.

    Raises:
        UserError: the file is no tar, is cut short, or a member's name is absolute or climbs out with ``..``.
    """
    with open(path, "rb", buffering=0) as file:
        fd = file.fileno()
        end = os.fstat(fd).st_size
        at, long_name = 0, None
        while True:
            header = os.pread(fd, BLOCK, at)
            if not header and unterminated and at:
                return
            if len(header) < BLOCK:
                raise UserError(
                    f"{path}: ends at byte {end} without a tar's end marker, so it was cut short or is still being "
                    "written; fetch it anew (or, if its members are known to be complete, index it with --unterminated)"
                )
            if header.count(0) == BLOCK:
                return
            try:
                size = member_size(header)
            except ValueError:
                raise UserError(
                    f"{path}: no tar header at offset {at}; the file is damaged or not a tar"
                ) from None
            kind, data = header[156:157], at + BLOCK
            if data + size > end:
                raise UserError(
                    f"{path}: member {long_name or member_name(header)!r} at offset {data} needs {size} bytes, but the "
                    f"file ends at {end}; it was cut short: fetch it anew"
                )
            at = data + -(-size // BLOCK) * BLOCK
            if kind == b"L":
                long_name = os.pread(fd, size, data).rstrip(b"\0").decode("utf-8", "surrogateescape")
                continue
            if kind == b"x":
                long_name = _pax_path(os.pread(fd, size, data)) or long_name
                continue
            if kind in _REGULAR:
                name = long_name or member_name(header)
                check_name(path, name, data)
                yield Member(name, data, size)
            long_name = None


def check_name(path: str, name: str, offset: int) -> None:
    """Raise UserError where a member's name is absolute or climbs out."""
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        raise UserError(
            f"{path}: member {name!r} at offset {offset} has an absolute or climbing path; "
            "such a shard is not to be trusted, and is refused"
        )


def _pax_path(data: bytes) -> str | None:
    while data:
        length = int(data.split(b" ", 1)[0])
        key, _, value = data[:length].split(b" ", 1)[1].partition(b"=")
        if key == b"path":
            return value.rstrip(b"\n").decode("utf-8", "surrogateescape")
        data = data[length:]
    return None


def header(name: str, size: int) -> bytes:
    """The header of a regular member, of fixed owner, mode and time, so that equal content gives equal shards.

    Raises:
        ValueError: the name is longer than 100 bytes in UTF-8.
    """
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) > 100:
        raise ValueError(f"member name of {len(encoded)} bytes")
    fields = (
        encoded.ljust(100, b"\0"),
        b"0000444\0" + b"0000000\0" * 2,
        b"%011o\0" % size + b"%011o\0" % 0,
        b" " * 8 + b"0" + bytes(100) + b"ustar\x0000" + b"root".ljust(32, b"\0") * 2,
    )
    block = bytearray(b"".join(fields).ljust(BLOCK, b"\0"))
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padding(size: int) -> bytes:
    """The zeros after a member's bytes."""
    return bytes(-size % BLOCK)


END = bytes(2 * BLOCK)
