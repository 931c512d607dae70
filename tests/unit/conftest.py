"""Real images in small numbers, and weights to look at them with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fashion_images import NAMES, image_folder

from dattrain.models import create
from dattrain.pretrained import weights
from dattrain.pretrained.pretrained_cfg import PretrainedCfg


@pytest.fixture(scope="session")
def val_folder(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("data") / "val", 60)


@pytest.fixture(scope="session")
def train_folder(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("data") / "train", 300, 1000)


@pytest.fixture(scope="session")
def cfg() -> PretrainedCfg:
    # Class folders are sorted by name, so the classes are too.
    return PretrainedCfg(
        "dat_atto", 10, (64, 64), crop_pct=1.0, classes=tuple(sorted(NAMES)), source="a test"
    )


@pytest.fixture(scope="session")
def atto(cfg):
    torch.manual_seed(0)
    return create("dat_atto", num_classes=10, img_size=64).eval()


@pytest.fixture(scope="session")
def weights_file(tmp_path_factory, atto, cfg) -> Path:
    path = tmp_path_factory.mktemp("weights") / "atto.safetensors"
    weights.save(path, atto.state_dict(), cfg)
    return path
