from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from pictures import encode
from PIL import Image

from dattrain.data.images import MAX_SIDE, BadImage, decode, size, sniff


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
