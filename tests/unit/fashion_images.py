"""Fashion-MNIST's test images as arrays, as class folders, and in scenes with the class of every pixel."""

from __future__ import annotations

import gzip
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from dattrain.demo.scenes import scene

NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
MAP_NAMES = ("ground", *NAMES)


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


def map_folder(root: Path, split: str, count: int, seed: int) -> Path:
    """Scenes in ADE20K's layout; returns their images. The first row of each map is void."""
    items, labels = fashion(300)
    for number in range(count):
        made = scene(items, labels, seed, number)
        numbers = np.zeros(made.image.shape[:2], np.uint8)
        for label, mask in zip(made.labels, made.masks):
            numbers[mask] = label + 1
        numbers[0] = 255
        for kind, pixels in (("images", made.image), ("annotations", numbers)):
            path = root / kind / split / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    (root / "classes.txt").write_text("\n".join(MAP_NAMES) + "\n")
    return root / "images" / split
