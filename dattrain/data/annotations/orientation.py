"""EXIF orientation of annotated images: applied or refused, by comparison with the size that was annotated.

Decoders here ignore it (``dattrain.data.decode.images``), as is right for ImageNet. Tools to annotate with may show the picture turned,
so that boxes and masks belong to the turned one; which it was, only the size tells.
"""

from __future__ import annotations

import io

from PIL import Image, ImageOps

from dattrain.data.decode import images
from dattrain.data.source.sample import BadSample

_ORIENTATION = 0x0112  # EXIF 2.32, 4.6.4
_TURNED = (5, 6, 7, 8)
"""Values that exchange width and height."""


def upright(data: bytes, size: tuple[int, int] | None, where: str) -> bytes:
    """An encoded image whose pixels are those that were annotated: ``data`` itself, or turned by its EXIF orientation and a PNG.

    Args:
        data: the encoded image.
        size: height and width that were annotated; None where nobody says.
        where: the sample, for messages.

    Raises:
        BadSample: neither the pixels as stored nor the turned ones have that size, or both have and differ.
    """
    try:
        stored = images.size(data)
    except images.BadImage as error:
        raise BadSample(f"{where}: {error}") from error
    value = _orientation(data)
    turned = stored[::-1] if value in _TURNED else stored
    if size is None:
        size = stored if value == 1 else None
    if value != 1 and (size is None or stored == turned == size):
        raise BadSample(
            f"{where}: its EXIF orientation is {value}, and its size does not tell whether the stored or the turned pixels were "
            "annotated; store them as they were annotated, without the tag"
        )
    if size == stored:
        return data
    if size != turned:
        also = f" (turned by its EXIF orientation {turned[1]} x {turned[0]})" if turned != stored else ""
        assert size is not None
        raise BadSample(
            f"{where}: its annotation is for {size[1]} x {size[0]} pixels, and the image has {stored[1]} x {stored[0]}{also}; both "
            "must be of one size"
        )
    try:
        with Image.open(io.BytesIO(data)) as image:
            right = ImageOps.exif_transpose(image)
            if right.mode not in ("RGB", "L"):
                right = right.convert("RGB")
            buffer = io.BytesIO()
            # Without loss, and without the tag: whoever reads it next must not turn it again.
            Image.frombytes(right.mode, right.size, right.tobytes()).save(buffer, "PNG", compress_level=1)
    except Exception as error:  # Pillow raises many types on damaged files
        raise BadSample(f"{where}: does not decode ({type(error).__name__}: {error})") from error
    return buffer.getvalue()


def _orientation(data: bytes) -> int:
    """1 to 8; 1 where nothing is said."""
    # Pillow takes longer to look than it takes to see that there is no EXIF at all.
    if b"Exif\0\0" not in data[: 1 << 17] and b"eXIf" not in data and b"EXIF" not in data:
        return 1
    try:
        with Image.open(io.BytesIO(data)) as image:
            value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # whatever is wrong there is met when it is decoded
        return 1
    return value if value in range(1, 9) else 1
