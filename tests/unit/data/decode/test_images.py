from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from pictures import encode
from PIL import Image, features

from dattrain.data.decode import images
from dattrain.data.decode.images import (
    IMAGE_EXTENSIONS,
    MAX_SIDE,
    BadImage,
    decode,
    is_image_name,
    size,
    sniff,
)


def test_every_encoding_decodes_as_pillow_does(encodings):
    for name, data in encodings.items():
        ours = decode(data).permute(1, 2, 0).numpy().astype(int)
        theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        assert ours.shape == theirs.shape == (427, 301, 3), name  # EXIF orientation is ignored
        assert size(data) == (427, 301), name
        assert np.abs(ours - theirs).max() <= (2 if name == "cmyk" else 0), name


def test_pixels_are_channels_last_in_memory(encodings):
    for data in encodings.values():
        assert decode(data)[None].is_contiguous(memory_format=torch.channels_last)


def test_magic_bytes_and_not_names_tell_the_kind(encodings):
    kinds = {name: sniff(data) for name, data in encodings.items()}
    assert {kinds[n] for n in ("420", "cmyk", "gray", "progressive", "exif")} == {"jpeg"}
    assert kinds["png"] == kinds["png-alpha"] == "png"
    assert (kinds["webp"], kinds["gif"], kinds["bmp"], kinds["tiff"]) == ("webp", "gif", "bmp", "other")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.98])
def test_a_truncated_image_is_bad(encodings, share):
    for name in ("420", "progressive", "cmyk", "png", "webp", "gif"):
        data = encodings[name]
        with pytest.raises(BadImage):
            decode(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"hello, this is a text file\n" * 20,
        b"<html></html>",
        b"\xff\xd8\xff",
        b"%!PS-Adobe-3.0 EPSF",
    ],
)
def test_what_is_no_image_is_bad(data):
    with pytest.raises(BadImage, match="not an image|JPEG that does not open"):
        decode(data)


def test_too_wide_and_bombs_are_refused_by_their_header():
    wide = encode(Image.new("L", (30_000, 4)))
    with pytest.raises(BadImage, match=f"30000 x 4 pixels; the limits are {MAX_SIDE} a side"):
        decode(wide)
    with pytest.raises(BadImage, match="30000 x 4"):
        decode(encode(Image.new("L", (30_000, 4)), "PNG"))
    with pytest.raises(BadImage, match="12000 x 12000"):
        decode(png_bomb(12_000, 12_000))
    with pytest.raises(BadImage, match="30000 x 4"):
        decode(encode(Image.new("L", (30_000, 4)), "GIF"))
    with pytest.raises(BadImage):
        decode(png_bomb(0, 10))


@pytest.mark.parametrize("first", [b"tEXt", b"IHDR"])
def test_a_second_header_does_not_pass_the_limits(first):
    """Pillow takes the size of the last, wherever it stands."""
    bomb, small = png_bomb(12_000, 12_000), png_bomb(8, 8)
    head = bytearray(small[8:33])
    head[4:8] = first
    head[21:25] = struct.pack(">I", zlib.crc32(head[4:21]))
    with pytest.raises(BadImage, match="12000 x 12000"):
        decode(bomb[:8] + bytes(head) + bomb[8:])


@pytest.mark.parametrize("side", [16, 1024, 1040, 32_768])
def test_tiles_larger_than_their_image_are_a_bomb_unless_they_are_small(side):
    pixels = zlib.compress(bytes([200]) * min(side, 1024) ** 2, 9)
    tags = {256: 3, 257: 2, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = (
        b"II*\0"
        + struct.pack("<I", 8 + len(pixels))
        + pixels
        + struct.pack("<H", len(tags))
        + entries
        + bytes(4)
    )
    if side <= 1024:
        assert decode(data).shape == (3, 2, 3) and (decode(data) == 200).all()
    else:
        with pytest.raises(BadImage, match=f"TIFF of 3 x 2 pixels in tiles of {side} x {side}"):
            decode(data)


def test_damage_inside_gives_an_image_or_a_clear_error(encodings):
    """Bits flipped anywhere: no other exception, no crash, no hang."""
    rng = np.random.default_rng(0)
    for name in ("420", "progressive", "png", "webp", "gif", "tiff", "bmp", "cmyk"):
        for _ in range(25):
            data = bytearray(encodings[name])
            for at in rng.integers(0, len(data), 5).tolist():
                data[at] ^= int(rng.integers(1, 256))
            with contextlib.suppress(BadImage):
                assert decode(bytes(data)).shape[0] == 3


def png_bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


RAMP = np.tile(np.arange(256, dtype=np.uint16) * 257, (4, 1))


def tiff12(values: np.ndarray) -> bytes:
    """A TIFF of 12 bits a pixel, two pixels in three bytes."""
    height, width = values.shape
    first, second = values.ravel()[::2].astype(int), values.ravel()[1::2].astype(int)
    packed = np.stack((first >> 4, (first & 15) << 4 | second >> 8, second & 255), 1).astype(np.uint8)
    short = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: packed.size}
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in short.items())
    place = struct.pack("<I", 8 + packed.size)
    return b"II*\0" + place + packed.tobytes() + struct.pack("<H", len(short)) + entries + bytes(4)


WIDE = {
    "png": lambda: encode(Image.fromarray(RAMP), "PNG"),
    "tiff": lambda: encode(Image.fromarray(RAMP), "TIFF"),
    "tiff big-endian": lambda: encode(
        Image.frombytes("I;16B", (256, 4), RAMP.astype(">u2").tobytes()), "TIFF"
    ),
    "tiff 12 bits": lambda: tiff12(RAMP >> 4),
    "tiff white is zero": lambda: encode(Image.fromarray(~RAMP), "TIFF", tiffinfo={262: 0}),
    "tiff float": lambda: encode(Image.fromarray(RAMP.astype(np.float32) / 65535), "TIFF"),
    "pgm": lambda: b"P5 256 4 65535\n" + RAMP.astype(">u2").tobytes(),
    "pgm 10 bits": lambda: b"P5 256 4 1023\n" + (RAMP >> 6).astype(">u2").tobytes(),
    "jpeg 2000": lambda: encode(Image.fromarray(RAMP), "JPEG2000"),
}


@pytest.mark.parametrize("kind", list(WIDE))
def test_gray_of_more_than_8_bits_keeps_its_brightness(kind):
    found = decode(WIDE[kind]()).numpy().astype(int)
    assert found.shape == (3, 4, 256)
    assert np.abs(found - np.arange(256)).max() <= 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 4), 12.5, np.float32), "floating point from 12.5 to 12.5"),
        (np.full((4, 4), -0.1, np.float32), "floating point from -0.1"),
        (np.full((4, 4), np.nan, np.float32), "floating point from nan"),
        (np.full((4, 4), 70_000, np.int32), "32-bit integers"),
    ],
)
def test_gray_without_a_known_white_is_bad(values, message):
    with pytest.raises(BadImage, match=message):
        decode(encode(Image.fromarray(values), "TIFF"))


def png_with(chunk: bytes, data: bytes, *, damaged: bool = False) -> bytes:
    """A whole PNG with one more chunk after its header."""
    whole = encode(Image.new("RGB", (8, 8)), "PNG")
    check = struct.pack(">I", zlib.crc32(chunk + data) ^ damaged)
    return whole[:33] + struct.pack(">I", len(data)) + chunk + data + check + whole[33:]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png_with(b"iCCP", b"p\0\0" + zlib.compress(bytes(1 << 21))), "Decompressed data too large"),
        (png_with(b"zTXt", b"c\0\0" + zlib.compress(bytes(1 << 21))), "Decompressed data too large"),
        (png_with(b"tEXt", b"c\0hello", damaged=True), "PNG that does not open .*tEXt"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "HEIC, which is not read here"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(99), "HEIC, which is not read here"),
        (b"\xff\x0a" + bytes(99), "JPEG XL, which is not read here"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99), "JPEG XL, which is not read here"),
    ],
)
def test_a_bad_image_keeps_the_true_reason(data, reason):
    with pytest.raises(BadImage, match=reason) as caught:
        decode(data)
    assert "not an image" not in str(caught.value)


def test_avif_is_read_or_named():
    if features.check("avif"):
        found = decode(encode(Image.new("RGB", (16, 16), (200, 30, 40)), "AVIF", quality=95))
        assert np.abs(found[:, 8, 8].numpy().astype(int) - [200, 30, 40]).max() <= 6
    else:
        with pytest.raises(BadImage, match="AVIF .* not read here"):
            decode(b"\0\0\0\x18ftypavif" + bytes(99))


def test_file_names_are_those_of_the_formats_that_are_read():
    Image.init()
    known = {extension[1:]: kind for extension, kind in Image.registered_extensions().items()}
    readable = set(images._FORMATS) | {"MPO"}  # which begins with a JPEG
    assert {name for name, kind in known.items() if kind in readable} - {"pfm"} <= IMAGE_EXTENSIONS
    assert {known[name] for name in IMAGE_EXTENSIONS & set(known)} <= readable
    assert is_image_name("a.b.JFIF") and not any(map(is_image_name, (".a.jpg", "a.heic", "a.txt", "jpg.")))
