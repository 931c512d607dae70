"""Encoded bytes to RGB pixels: magic bytes first, libjpeg-turbo for JPEG, Pillow as the second way.

EXIF orientation is ignored, as timm and torchvision's folders do. Sizes are read from the header before anything is
decoded, so that a decompression bomb costs nothing.
"""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
import simplejpeg
import torch
from PIL import Image

MAX_SIDE = 16_384
"""Pixels; the longest side of ImageNet-22K's images is well below."""
MAX_PIXELS = 89_478_485
"""Where Pillow begins to suspect a decompression bomb."""

# Pillow would try every format that it knows, among them some that start other programs (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF", "JPEG2000")

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "pgm", "tif", "tiff"})


class BadImage(ValueError):
    """The bytes are no image that can be used; the message says why, without naming the sample."""


def is_image_name(name: str) -> bool:
    """Whether a file name ends like an image."""
    return not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def sniff(data: bytes) -> str:
    """``jpeg``, ``png``, ``webp``, ``gif``, ``bmp`` or ``other``, by the magic bytes."""
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
    return "other"


def size(data: bytes) -> tuple[int, int]:
    """Height and width from the header, before EXIF orientation.

    Raises:
        BadImage: not an image, or larger than ``MAX_SIDE`` or ``MAX_PIXELS``.
    """
    kind = sniff(data)
    found: tuple[int, int] | None = None
    if kind == "jpeg":
        frame = _jpeg_frame(data)
        found = None if frame is None else frame[:2]
    elif kind == "png" and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        found = height, width
    if found is None:
        with _open(data) as image:
            found = image.height, image.width
    height, width = found
    if max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise BadImage(
            f"{width} x {height} pixels; the limits are {MAX_SIDE} a side and {MAX_PIXELS} in all (a decompression bomb?)"
        )
    if min(height, width) < 1:
        raise BadImage(f"{width} x {height} pixels")
    return height, width


def decode(data: bytes) -> torch.Tensor:
    """RGB pixels, 3 x H x W uint8, in channels-last memory. Gray, CMYK and alpha are converted as Pillow does.

    Raises:
        BadImage: not an image, cut short, or too large.
    """
    size(data)
    frame = _jpeg_frame(data) if sniff(data) == "jpeg" else None
    # Of four components libjpeg-turbo makes RGB in a way of its own.
    if frame is not None and frame[2] != 4:
        try:
            return torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)
        except ValueError:
            pass  # Pillow has its own libjpeg and more patience; where it fails too, its message is the better one.
    return torch.from_numpy(np.array(decode_pillow(data))).permute(2, 0, 1)


def decode_pillow(data: bytes) -> Image.Image:
    """The image as Pillow reads it, in RGB. Raises BadImage."""
    with _open(data) as image:
        try:
            return image.convert("RGB")
        except Exception as error:
            raise BadImage(f"{image.format} that does not decode ({_reason(error)})") from error


def _open(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        # Our own limits are checked by ``size``.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(data), formats=_FORMATS)
        except Image.DecompressionBombError as error:
            raise BadImage(f"too many pixels ({error})") from error
        except Exception as error:
            # Pillow's plugins raise many types on damaged headers: OSError, SyntaxError, struct.error, ...
            start = data[:16]
            raise BadImage(f"not an image (it starts with {start!r})") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _jpeg_frame(data: bytes) -> tuple[int, int, int] | None:
    """Height, width and number of components from the frame header (ITU-T T.81, B.2.2); None where there is none."""
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
