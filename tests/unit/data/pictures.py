"""Small files for the tests of data."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dattrain.data.source import tar


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], *, end: bytes = tar.END) -> Path:
    """A tar of the members."""
    path.write_bytes(
        b"".join(tar.header(name, len(data)) + data + tar.padding(len(data)) for name, data in members) + end
    )
    return path
