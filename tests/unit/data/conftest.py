"""Photographs in every encoding that ImageNet holds, and small sets of shards made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from pictures import encode, write_tar
from PIL import Image

from dattrain.data.prepare.index_shards import index_shards

# Other processes share the cores; a slow example is no failure.
settings.register_profile("data", deadline=None)
settings.load_profile("data")


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A photograph of 512 x 600 pixels."""
    from matplotlib.cbook import get_sample_data

    with get_sample_data("grace_hopper.jpg") as file:
        return Image.open(file).convert("RGB")


@pytest.fixture(scope="session")
def encodings(photo: Image.Image) -> dict[str, bytes]:
    """One picture, as ImageNet's uploaders might have encoded it."""
    image = photo.crop((40, 60, 341, 487))
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "420": encode(image, subsampling="4:2:0"),
        "422": encode(image, subsampling="4:2:2"),
        "444": encode(image, subsampling="4:4:4", quality=95),
        "gray": encode(image.convert("L")),
        "cmyk": encode(image.convert("CMYK")),
        "progressive": encode(image, progressive=True),
        "exif": encode(image, exif=exif),
        "png": encode(image, "PNG"),
        "png-alpha": encode(image.convert("RGBA"), "PNG"),
        "png-palette": encode(image.convert("P"), "PNG"),
        "png-gray": encode(image.convert("L"), "PNG"),
        "webp": encode(image, "WEBP", lossless=True),
        "gif": encode(image.convert("P"), "GIF"),
        "bmp": encode(image, "BMP"),
        "tiff": encode(image, "TIFF"),
    }


@pytest.fixture(scope="session")
def jpegs(photo: Image.Image) -> list[bytes]:
    """Twelve small photographs."""
    rng = np.random.default_rng(0)
    out = []
    for _ in range(12):
        w, h = rng.integers(48, 120, 2).tolist()
        x, y = int(rng.integers(0, 512 - w)), int(rng.integers(0, 600 - h))
        out.append(encode(photo.crop((x, y, x + w, y + h)), quality=90))
    return out


@pytest.fixture
def make_shards(tmp_path: Path, jpegs: list[bytes]) -> Callable[..., Path]:
    """Writes indexed shards of the given sample counts; labels are number % 10. Returns their folder."""

    def make(
        counts: Sequence[int] = (13, 7, 20, 9), *, name: str = "set", bad: dict[int, bytes] | None = None
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        number = 0
        for shard, count in enumerate(counts):
            members: list[tuple[str, bytes]] = []
            for _ in range(count):
                data = (bad or {}).get(number, jpegs[number % len(jpegs)])
                members += [(f"{number:05d}.jpg", data), (f"{number:05d}.cls", b"%d" % (number % 10))]
                number += 1
            write_tar(folder / f"train-{shard:04d}.tar", members)
        index_shards([str(path) for path in sorted(folder.glob("*.tar"))])
        return folder

    return make
