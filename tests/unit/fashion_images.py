"""Fashion-MNIST's test images as arrays and as class folders."""

from __future__ import annotations

import gzip
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def fashion(count: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images n x 28 x 28 uint8 and labels of Fashion-MNIST's test set."""
    folder = resources.files("dattrain") / "demo"
    images = np.frombuffer(
        gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16
    )
    labels = np.frombuffer(
        gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8
    )
    return images.reshape(-1, 28, 28)[start : start + count], labels[start : start + count]


def image_folder(root: Path, count: int, start: int = 0, names: tuple[str, ...] = NAMES) -> Path:
    """One folder per class; at least ten images so that each class has one (fixed by where we look)."""
    for i, (image, label) in enumerate(zip(*fashion(count, start))):
        folder = root / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{start + i:05d}.png")
    return root
