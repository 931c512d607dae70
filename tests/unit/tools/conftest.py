"""Real images in small numbers, and weights to look at them with."""

from __future__ import annotations

import gzip
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dattrain.models import create
from dattrain.tools import weights

NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def fashion(count: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images n x 28 x 28 uint8 and labels of Fashion-MNIST's test set."""
    folder = resources.files("dattrain") / "demo"
    images = np.frombuffer(gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    return images.reshape(-1, 28, 28)[start : start + count], labels[start : start + count]


def image_folder(root: Path, count: int, start: int = 0, names: tuple[str, ...] = NAMES) -> Path:
    """One folder per class; at least ten images so that each class has one (fixed by where we look)."""
    for i, (image, label) in enumerate(zip(*fashion(count, start))):
        folder = root / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{start + i:05d}.png")
    return root


@pytest.fixture(scope="session")
def val_folder(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("data") / "val", 60)


@pytest.fixture(scope="session")
def train_folder(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("data") / "train", 300, 1000)


@pytest.fixture(scope="session")
def card() -> weights.Card:
    # Class folders are sorted by name, so the classes are too.
    return weights.Card("dat_atto", 10, (64, 64), crop_pct=1.0, classes=tuple(sorted(NAMES)), source="a test")


@pytest.fixture(scope="session")
def atto(card):
    torch.manual_seed(0)
    return create("dat_atto", num_classes=10, img_size=64).eval()


@pytest.fixture(scope="session")
def weights_file(tmp_path_factory, atto, card) -> Path:
    path = tmp_path_factory.mktemp("weights") / "atto.safetensors"
    weights.save(path, atto.state_dict(), card)
    return path
