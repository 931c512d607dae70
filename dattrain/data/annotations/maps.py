"""Maps of class numbers as PNG: one channel, a number per pixel; read, checked and written.

Gray of 1, 2 or 4 bits holds the numbers themselves (Pillow stretches them to 0..255, which is undone here); of a palette the
indices are the numbers, whatever its colours. Everything else is refused: 16 bits, colours, an alpha channel.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dattrain.data.decode import images
from dattrain.data.source.sample import BadSample

VOID = 255
"""Number of pixels that belong to no class: they are not learnt from and not counted (Cityscapes' and mmseg's ignore index)."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GRAY, _PALETTE = 0, 3
_COLOURS = {2: "RGB colours", 4: "gray with an alpha channel", 6: "RGB colours with an alpha channel"}


@dataclass(frozen=True)
class MapHeader:
    """What the first bytes of a PNG say.

    Attributes:
        height, width: pixels.
        bits: per channel.
        colour: type of colour (ISO/IEC 15948, 11.2.2): 0 gray, 2 RGB, 3 palette, 4 and 6 with alpha.
    """

    height: int
    width: int
    bits: int
    colour: int

    @property
    def holds_numbers(self) -> bool:
        """Whether a pixel is one number of at most 8 bits."""
        return self.colour in (_GRAY, _PALETTE) and self.bits <= 8


def header(data: bytes) -> MapHeader | None:
    """Header of a PNG from its first 26 bytes; None for what is no PNG."""
    if data[:8] != _SIGNATURE or data[12:16] != b"IHDR" or len(data) < 26:
        return None
    width, height, bits, colour = struct.unpack(">IIBB", data[16:26])
    return MapHeader(height, width, bits, colour)


def read(data: bytes, where: str) -> NDArray[np.uint8]:
    """The numbers of a map, H x W.

    Args:
        data: of the PNG.
        where: the sample, for messages.

    Raises:
        BadSample: no PNG, damaged, too large, or of colours or 16 bits.
    """
    found = header(data)
    if found is None:
        raise BadSample(
            f"{where}: its map is no PNG (it begins with {data[:8]!r}); a map is a PNG of one channel of 8 bits, a class number "
            "per pixel"
        )
    try:
        images.size(data)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()
            if not found.holds_numbers:
                what = _COLOURS.get(found.colour, f"{found.bits} bits a pixel")
                raise BadSample(
                    f"{where}: its map holds {what} ({_pixel(image)}); a map is a PNG of one channel of 8 bits, a class number per "
                    "pixel (or a palette's index): convert it"
                )
            numbers = np.asarray(image).astype(np.uint8)
    except BadSample:
        raise
    except images.BadImage as error:
        raise BadSample(f"{where}: its map: {error}") from error
    except Exception as error:  # Pillow raises many types on damaged files
        raise BadSample(f"{where}: its map does not decode ({type(error).__name__}: {error})") from error
    if found.colour == _GRAY and 1 < found.bits < 8:
        numbers //= 255 // (2**found.bits - 1)
    return numbers


def write(numbers: NDArray[np.uint8], level: int = 6) -> bytes:
    """A gray PNG of H x W numbers; ``level`` is zlib's."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(numbers)).save(buffer, "PNG", compress_level=level)
    return buffer.getvalue()


def _pixel(image: Image.Image) -> str:
    """The first pixel that is not zero, as an example of what a map holds."""
    values = np.asarray(image)
    flat = values.reshape(image.height, image.width, -1)
    places = np.argwhere(flat.any(axis=2))
    y, x = places[0].tolist() if len(places) else (0, 0)
    value = tuple(flat[y, x].tolist())
    return f"{value if len(value) > 1 else value[0]} at x={x}, y={y}"
