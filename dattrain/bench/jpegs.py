"""JPEGs to measure on: crops of photographs that packages bring along, of ImageNet's usual size and weight.

ImageNet's images are about 500 x 375 pixels and 70 KB at quality 90 and over; what a decoder costs goes with both. An
enlarged crop is smoother than a photograph, so grain is added until the files weigh that much.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from matplotlib.cbook import get_sample_data
from PIL import Image

CLASSES = 10


def photographs() -> list[Image.Image]:
    """matplotlib's, and scikit-learn's and scikit-image's where they are installed."""
    path = get_sample_data("grace_hopper.jpg", asfileobj=False)
    found = [Image.open(str(path)).convert("RGB")]
    try:
        from sklearn.datasets import load_sample_images

        found += [Image.fromarray(image) for image in load_sample_images().images]
    except ImportError:
        pass
    try:
        from skimage import data

        found += [Image.fromarray(getattr(data, name)()) for name in ("astronaut", "coffee", "chelsea")]
    except ImportError:
        pass
    return found


def write_folder(folder: Path, count: int) -> None:
    """``count`` JPEGs in ten class folders: 4:2:0, quality 88 to 92, sides of 500 +- 25 and 375 +- 25 pixels."""
    rng = np.random.default_rng(0)
    sources = photographs()
    for label in range(CLASSES):
        (folder / f"{label:02d}").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        data = _jpeg(sources[int(rng.integers(len(sources)))], rng)
        (folder / f"{i % CLASSES:02d}" / f"{i:06d}.jpg").write_bytes(data)


def _jpeg(photo: Image.Image, rng: np.random.Generator) -> bytes:

    long, short = (int(side + rng.integers(-25, 26)) for side in (500, 375))
    width, height = (long, short) if rng.random() < 0.75 else (short, long)
    scale = min(photo.width / width, photo.height / height) * rng.uniform(0.5, 1.0)
    w, h = width * scale, height * scale
    x, y = rng.uniform(0, photo.width - w), rng.uniform(0, photo.height - h)
    # A tilted quadrilateral of the photograph, in other colours, perhaps mirrored.
    tilt = rng.uniform(-0.05, 0.05, 8)
    corners = np.array([x, y, x, y + h, x + w, y + h, x + w, y]) + tilt * np.array([w, h] * 4)
    image = photo.transform((width, height), Image.Transform.QUAD, corners.tolist(), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32) * rng.uniform(0.8, 1.2, 3) + rng.uniform(-15, 15)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    pixels = pixels + rng.normal(0, rng.uniform(5, 9), (height, width, 1))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(
        buffer, "JPEG", quality=int(rng.integers(88, 93)), subsampling="4:2:0"
    )
    return buffer.getvalue()
