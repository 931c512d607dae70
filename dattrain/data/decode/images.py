"""Encoded bytes to RGB pixels: magic bytes first, libjpeg-turbo for JPEG, Pillow as the second way.

EXIF orientation is ignored, as timm and torchvision's folders do. Sizes are read from the header before anything is
decoded, so that a decompression bomb costs nothing. What image files may be called stands here too, beside what is read.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    import torch

MAX_SIDE = 16_384
"""Pixels; the longest side of ImageNet-22K's images is well below."""
MAX_PIXELS = 89_478_485
"""Where Pillow begins to suspect a decompression bomb."""

# Pillow would try every format that it knows, among them some that start other programs (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "PPM", "TIFF", "JPEG2000", "AVIF")
_EXTENSIONS = {
    "JPEG": "jpg jpeg jpe jif jfif pjpeg pjp mpo",
    "PNG": "png apng",
    "WEBP": "webp",
    "BMP": "bmp dib",
    "GIF": "gif",
    # Not pfm: such files are depth maps that lie beside images.
    "PPM": "ppm pgm pbm pnm",
    "TIFF": "tif tiff",
    "JPEG2000": "jp2 j2k j2c jpc jpf jpx",
    "AVIF": "avif avifs",
}
IMAGE_EXTENSIONS = frozenset(" ".join(_EXTENSIONS.values()).split())
"""File names that end so, in either case, are images: of folders, of tar members, of what a verb is given."""

# ISO base media files: the brand says what is in them (MIAF, ISO/IEC 23000-22; HEIF, ISO/IEC 23008-12).
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "avif"),
    **dict.fromkeys(
        (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"), "heic"
    ),
}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _TILE = 258, 262, (322, 323)  # TIFF 6.0
_SMALL_TILE = 1024 * 1024
_UNREAD = {"avif": "AVIF (Pillow reads it from 11.3 on)", "heic": "HEIC", "jxl": "JPEG XL"}


class BadImage(ValueError):
    """The bytes are no image that can be used; the message says why, without naming the sample."""


def sniff(data: bytes) -> str:
    """``jpeg``, ``png``, ``webp``, ``gif``, ``bmp``, ``avif``, ``heic``, ``jxl`` or ``other``, by the magic bytes."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:4] == b"GIF8":
        return "gif"
    if data[:2] == b"BM":
        return "bmp"
    if data[4:8] == b"ftyp":
        return _BRANDS.get(bytes(data[8:12]), "other")
    if data[:2] == b"\xff\x0a" or data[:12] == b"\0\0\0\x0cJXL \r\n\x87\n":
        return "jxl"
    return "other"


def is_image_name(name: str) -> bool:
    """Whether a file name ends like an image, and is not hidden."""
    return not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def size(data: bytes) -> tuple[int, int]:
    """Height and width from the header, before EXIF orientation.

    Raises:
        BadImage: not an image, or larger than ``MAX_SIDE`` or ``MAX_PIXELS``.
    """
    return _size(data, sniff(data), _jpeg_frame(data))


def _size(data: bytes, kind: str, frame: tuple[int, int, int] | None) -> tuple[int, int]:
    """``size`` of what is known to be of ``kind``, and of a JPEG its ``_jpeg_frame``."""
    found = None if frame is None else frame[:2]
    if kind == "png" and len(data) >= 24 and data[12:16] == b"IHDR":
        width, height = struct.unpack(">II", data[16:24])
        found = height, width
    if found is None:
        with _open(data) as image:
            found = image.height, image.width
    _check_size(*found)
    return found


def _check_size(height: int, width: int) -> None:
    """Raise BadImage where a side or the whole is beyond the limits, or nothing is there."""
    if max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise BadImage(
            f"{width} x {height} pixels; the limits are {MAX_SIDE} a side and {MAX_PIXELS} in all (a decompression bomb?)"
        )
    if min(height, width) < 1:
        raise BadImage(f"{width} x {height} pixels")


def decode(data: bytes) -> torch.Tensor:
    """RGB pixels, 3 x H x W uint8, in channels-last memory.

    Gray, CMYK and alpha are converted as Pillow does; gray of more than 8 bits as ``decode_pillow`` says.

    Raises:
        BadImage: not an image, cut short, too large, or of numbers that say no brightness.
    """
    return decode_reduced(data, lambda height, width: 1).pixels


class Decoded(NamedTuple):
    """RGB pixels of an image of ``size`` (height, width), 3 x ceil(height / factor) x ceil(width / factor) uint8, channels last."""

    pixels: torch.Tensor
    size: tuple[int, int]
    factor: int


def decode_reduced(data: bytes, factor: Callable[[int, int], int]) -> Decoded:
    """As ``decode``; a JPEG is reduced by ``factor(height, width)``, one of 1, 2, 4 and 8, while it is decoded.

    That is libjpeg's scaled inverse DCT: 8 x 8 coefficients become 4 x 4, 2 x 2 or 1 pixels, and the rest is never made. What
    libjpeg-turbo does not decode is not reduced either, and has a factor of 1.

    Raises:
        BadImage: see ``decode``.
    """
    import torch  # here, since whoever lists shards needs the names of this file alone

    frame = _jpeg_frame(data)
    height, width = _size(data, sniff(data), frame)
    # Of four components libjpeg-turbo makes RGB in a way of its own.
    if frame is not None and frame[2] != 4:
        by = factor(height, width)
        least = -(-height // by), -(-width // by)
        try:
            array = simplejpeg.decode_jpeg(
                data, min_height=least[0] * (by > 1), min_width=least[1] * (by > 1)
            )
        except ValueError:
            pass  # Pillow has its own libjpeg and more patience; where it fails too, its message is the better one.
        else:
            size = (height, width) if by > 1 else array.shape[:2]
            return Decoded(torch.from_numpy(array).permute(2, 0, 1), size, by)
    array = np.array(decode_pillow(data))
    return Decoded(torch.from_numpy(array).permute(2, 0, 1), array.shape[:2], 1)


def decode_pillow(data: bytes) -> Image.Image:
    """The image as Pillow reads it, in RGB.

    Gray of more than 8 bits keeps its highest 8, as Pillow keeps them of 16-bit colour (its own conversion of gray clips at 255
    instead); of TIFF the stated number of bits counts, up to 16. Floating point is brightness from 0 to 1.

    Raises:
        BadImage: see ``decode``.
    """
    with _open(data) as image:
        # A second header may have said otherwise than the first.
        _check_size(image.height, image.width)
        try:
            return _gray(image).convert("RGB") if image.mode[0] in "IF" else image.convert("RGB")
        except BadImage:
            raise
        except Exception as error:
            raise BadImage(f"{image.format} that does not decode ({_reason(error)})") from error


def _gray(image: Image.Image) -> Image.Image:
    """8-bit gray (mode ``L``) of an image in mode I;16 (either byte order), I or F. Raises BadImage where that has no rule."""
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not 0 <= low <= high <= 1:
            raise BadImage(
                f"{image.format} of floating point from {low:g} to {high:g}, of which only 0 (black) to 1 (white) is known "
                "to be brightness; save it with 8 bits"
            )
        gray = np.rint(values * np.float32(255)).astype(np.uint8)
    elif image.mode == "I" and image.format == "TIFF":
        raise BadImage(
            "TIFF of signed or 32-bit integers, which do not say what is white; save it with 8 bits"
        )
    else:
        # Mode I elsewhere: what Pillow makes of 16-bit PGM, and before version 11 of 16-bit PNG.
        (bits,) = tags.get(_BITS_PER_SAMPLE, (16,))
        gray = (values >> (bits - 8)).clip(0, 255).astype(np.uint8)
    # Pillow inverts 8-bit TIFF that says so, and nothing wider.
    return Image.fromarray(~gray if tags.get(_PHOTOMETRIC) == 0 else gray)


def _open(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        # Our own limits are checked by ``size``.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=_readable())
        except Image.DecompressionBombError as error:
            raise BadImage(f"too many pixels ({error})") from error
        except UnidentifiedImageError as error:
            raise BadImage(_unidentified(data)) from error
        except Exception as error:
            # Pillow's plugins raise many types on damaged headers: OSError, ValueError, struct.error, ...
            kind = sniff(data)
            name = "an image" if kind == "other" else kind.upper()
            raise BadImage(f"{name} that does not open ({_reason(error)})") from error
    _check_tiles(image)
    return image


def _check_tiles(image: Image.Image) -> None:
    """Raise BadImage for a TIFF whose tiles, each of which is unpacked whole, are larger than it, but for small ones."""
    sides = [getattr(image, "tag_v2", {}).get(tag, 1) for tag in _TILE]
    if all(isinstance(side, int) for side in sides) and math.prod(sides) > max(
        _SMALL_TILE, math.prod(image.size)
    ):
        raise BadImage(
            f"TIFF of {image.width} x {image.height} pixels in tiles of {sides[0]} x {sides[1]} (a decompression bomb?)"
        )


@cache
def _readable() -> tuple[str, ...]:
    """Those of ``_FORMATS`` that this Pillow knows."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _unidentified(data: bytes) -> str:
    """Why no plugin of Pillow's took the file: what the one for it says, which ``Image.open`` keeps to itself."""
    kind = sniff(data)
    for name in _readable() if kind not in ("heic", "jxl") else ():
        factory, accepts = Image.OPEN[name]
        if accepts is None or accepts(data[:16].ljust(16)) is not True:
            continue
        try:
            factory(io.BytesIO(data), "").close()
        except Exception as error:
            return f"{name} that does not open ({_reason(error)})"
    if kind in _UNREAD:
        return f"{_UNREAD[kind]}, which is not read here; save it as JPEG or PNG"
    return f"not an image (it starts with {data[:16]!r})"


def _reason(error: Exception) -> str:
    # Pillow raises SyntaxError for what is wrong in a header; the word would be taken for a fault of the program.
    said = isinstance(error, SyntaxError) and str(error)
    return said or (f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def _jpeg_frame(data: bytes) -> tuple[int, int, int] | None:
    """Height, width and number of components from a JPEG's frame header (ITU-T T.81, B.2.2); None where there is none."""
    if sniff(data) != "jpeg":
        return None
    at, end = 2, len(data) - 9
    while at < end:
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (data[at + 5] << 8) | data[at + 6], (data[at + 7] << 8) | data[at + 8]
            return height, width, data[at + 9]
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:
            at += 2
        elif marker in (0xD9, 0xDA):
            return None
        else:
            at += 2 + ((data[at + 2] << 8) | data[at + 3])
    return None
