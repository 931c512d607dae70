"""Reading and writing the tar format as WebDataset shards use it: a scan of headers alone, and plain members.

``tarfile`` reads a member's header through several Python objects; a shard of 14 million samples has 42 million
members, so the scan here touches the 512 bytes that it needs. What it passes by has a kind, so that whoever counts
what is left out can name it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dattrain.data.source.files import explained, open_file
from dattrain.errors import UserError

BLOCK = 512
FILE, HARD_LINK, SPARSE = "file", "hard link", "sparse file"
_EXTENDED_LIMIT = 16 << 20
"""Bytes of one extended header; xattrs and the maps of sparse files stay far below."""
_KINDS = {
    b"2": "symbolic link",
    b"3": "device",
    b"4": "device",
    b"6": "FIFO",
    b"M": "part of a file on several volumes",
}
_NO_CONTENT = (b"3", b"4", b"5", b"6")
_NO_MEMBER = (b"5", b"D", b"V", b"g")
"""Folders, lists of a folder's files, names of volumes, and settings for all members."""
_COMPRESSED = (
    (b"\x1f\x8b", "gzip", "gunzip it"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd it"),
    (b"\xfd7zXZ\0", "xz", "unxz it"),
    (b"BZh", "bzip2", "bunzip2 it"),
    (b"PK\x03\x04", "zip", "unzip it, and pack the folder with `dattrain data pack`"),
)
COMPRESSED_NAME = re.compile(r"\.(tar\.(gz|zst|xz|bz2)|tgz|tbz2?|txz)$")
"""What compressed tars are called."""


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a tar.

    Attributes:
        name: its path in the tar.
        offset, size: where its bytes are; of a hard link, those of the earlier member that it names.
        kind: ``FILE``, ``HARD_LINK`` (to an earlier file); else what stands there instead of a file's bytes.
    """

    name: str
    offset: int
    size: int
    kind: str = FILE

    @property
    def readable(self) -> bool:
        """Whether the bytes are the file's."""
        return self.kind in (FILE, HARD_LINK)


def member_size(header: bytes) -> int:
    """Size field of a header: octal, or base 256 for large members. Raises ValueError for a broken header."""
    if _octal(header[148:156]) != sum(header[:148]) + 8 * 32 + sum(header[156:BLOCK]):
        raise ValueError("checksum of the header")
    field = header[124:136]
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return _octal(field)


def _octal(field: bytes) -> int:
    # int() alone would take signs, and a negative size is an endless loop.
    digits = field.partition(b"\0")[0].strip()
    if not re.fullmatch(rb"[0-7]*", digits):
        raise ValueError("not an octal number")
    return int(digits or b"0", 8)


def member_name(header: bytes) -> str:
    """Name in a header, with the prefix of the POSIX format."""
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        if prefix:
            name = prefix + b"/" + name
    return _text(name)


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member, as WebDataset splits them: at the first dot of the last part."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def scan(
    path: str, *, unterminated: bool = False, start: int = 0, size: int | None = None
) -> Iterator[Member]:
    """Members of a tar, by reading its headers alone; folders are left out.

    Args:
        unterminated: accept a tar without its end marker, as a writer that was killed leaves it.
        start, size: where the tar lies in the file, for a tar within a tar; the whole file when None.

    Raises:
        UserError: the file is no tar, is cut short, has data after its end marker, or a member's name is absolute or
            climbs out with ``..``.
    """
    with explained(path), open(open_file(path), "rb", buffering=0) as file:
        fd = file.fileno()
        end = os.fstat(fd).st_size if size is None else start + size
        yield from walk(
            path, lambda at, n: os.pread(fd, n, at), start=start, end=end, unterminated=unterminated
        )


def walk(
    path: str, read: Callable[[int, int], bytes], *, start: int, end: int, unterminated: bool = False
) -> Iterator[Member]:
    """Scan the bytes from ``start`` to ``end`` that ``read(offset, length)`` gives, as ``scan`` does a file.

    ``path`` is for messages.
    """
    at = start
    long_name: bytes | None = None
    long_link: bytes | None = None
    records: dict[bytes, bytes] = {}
    files: dict[str, tuple[int, int]] = {}
    while True:
        header = read(at, min(BLOCK, end - at)) if at < end else b""
        if not header and unterminated and at > start:
            return
        if len(header) < BLOCK:
            raise UserError(
                f"{path}: ends at byte {end} without a tar's end marker, so it was cut short or is still being "
                "written; fetch it anew (or, if its members are known to be complete, index it with --unterminated)"
            )
        if header.count(0) == BLOCK:
            _check_end(path, read, at, end)
            return
        try:
            size = member_size(header)
        except ValueError:
            raise UserError(f"{path}: no tar header at offset {at}; {_instead(header, at)}") from None
        kind, data = header[156:157], at + BLOCK
        extended = kind in (b"L", b"K", b"x", b"X", b"g")
        if not extended:
            size = int(records.get(b"size", size))
        if kind == b"S":
            data = _sparse_data(read, header, data, end)
        # The size of a link is that of its file; only some writers put its bytes there too.
        if kind in _NO_CONTENT or (kind in (b"1", b"2") and _is_header(read(data, BLOCK))):
            size = 0
        name = _text(records.get(b"path", long_name or b"")) or member_name(header)
        if data + size > end:
            raise UserError(
                f"{path}: member {name!r} at offset {data} needs {size} bytes, but the "
                f"file ends at {end}; it was cut short: fetch it anew"
            )
        if extended:
            if size > _EXTENDED_LIMIT:
                raise UserError(
                    f"{path}: no tar header at offset {at}; an extended header of {size} bytes: the file is damaged"
                )
            content = read(data, size)
            if kind == b"L":
                long_name = content.rstrip(b"\0")
            elif kind == b"K":
                long_link = content.rstrip(b"\0")
            else:
                found = _pax_records(path, content, at)
                if kind != b"g":
                    records = found
        at = data + -(-size // BLOCK) * BLOCK
        if extended:
            continue
        what, place = _describe(kind, name, records), (data, size)
        if what == HARD_LINK:
            link = _text(records.get(b"linkpath", long_link or header[157:257].split(b"\0", 1)[0]))
            if link.removeprefix("./") in files:
                place = files[link.removeprefix("./")]
            else:
                what = f"hard link to {link!r}, which is no file before it"
        name = _text(records.get(b"GNU.sparse.name", b"")) or name
        long_name, long_link, records = None, None, {}
        if what is None:
            continue
        check_name(path, name, data)
        member = Member(name, *place, what)
        if member.readable:
            files[name.removeprefix("./")] = place
        yield member


def _describe(kind: bytes, name: str, records: dict[bytes, bytes]) -> str | None:
    """Kind of a member, None for one that holds no file's bytes by its nature."""
    if kind in _NO_MEMBER or (kind == b"\0" and name.endswith("/")):
        return None
    if kind == b"S" or any(key.startswith(b"GNU.sparse.") for key in records):
        return SPARSE
    if kind == b"1":
        return HARD_LINK
    if kind in (b"0", b"\0", b"7"):
        return FILE
    return _KINDS.get(kind, f"member of type {_text(kind)!r}")


def _sparse_data(read: Callable[[int, int], bytes], header: bytes, data: int, end: int) -> int:
    """Where the bytes of an old GNU sparse member begin: after the blocks that continue its map of holes."""
    more = header[482]
    while more and data + BLOCK <= end:
        more = read(data, BLOCK)[504]
        data += BLOCK
    return data


def _is_header(block: bytes) -> bool:
    try:
        member_size(block)
    except (ValueError, IndexError):
        return False
    return True


def _check_end(path: str, read: Callable[[int, int], bytes], at: int, end: int) -> None:
    """Raise UserError where anything but zeros follows a block of zeros."""
    place = at + BLOCK
    while place < end:
        part = read(place, min(1 << 20, end - place))
        if not part:
            return
        if part.count(0) != len(part):
            place += len(part) - len(part.lstrip(b"\0"))
            raise UserError(
                f"{path}: a block of zeros at offset {at} ends the tar, but there is data after it, at offset {place}: "
                "these are tars joined by `cat`, or the block is damage; fetch the parts as shards of their own, or unpack "
                "it with `tar --ignore-zeros -xf` and pack the files with `dattrain data pack`"
            )
        place += len(part)


def _instead(block: bytes, at: int) -> str:
    for magic, name, remedy in _COMPRESSED if at == 0 else ():
        if block.startswith(magic):
            return f"it is compressed by {name}: {remedy}, shards must be plain tars, in which any image can be found"
    return "the file is damaged or not a tar"


def check_name(path: str, name: str, offset: int) -> None:
    """Raise UserError where a member's name is absolute or climbs out."""
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        raise UserError(
            f"{path}: member {name!r} at offset {offset} has an absolute or climbing path; "
            "such a shard is not to be trusted, and is refused"
        )


def _pax_records(path: str, data: bytes, at: int) -> dict[bytes, bytes]:
    """Records of an extended header (POSIX.1-2001, pax): ``length key=value``, each ended by a line break."""
    found: dict[bytes, bytes] = {}
    rest = data.rstrip(b"\0")
    while rest:
        match = re.match(rb"(\d{1,9}) ([^=\n]+)=", rest)
        length = int(match[1]) if match else 0
        if match is None or not match.end() < length <= len(rest) or rest[length - 1 : length] != b"\n":
            raise UserError(
                f"{path}: the extended header at offset {at} is malformed ({rest[:40]!r}); the file is damaged: fetch it anew"
            )
        found[match[2]] = rest[match.end() : length - 1]
        rest = rest[length:]
    if not re.fullmatch(rb"\d{1,19}", found.get(b"size", b"0")):
        raise UserError(
            f"{path}: the extended header at offset {at} has the size {found[b'size'][:40]!r}, not a number; the file is "
            "damaged: fetch it anew"
        )
    return found


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


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
