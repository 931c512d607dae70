"""Real images in small numbers, with and without maps of their classes, scenes of objects, and weights to look at them with."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import objects
import pytest
import torch
import warm
import yaml
from fashion_images import MAP_NAMES, NAMES, image_folder, map_folder

from dattrain.config.load import loads
from dattrain.models import create
from dattrain.models.dense.detector import Detector
from dattrain.models.dense.segmenter import Segmenter
from dattrain.pretrained import weights
from dattrain.pretrained.pretrained_cfg import PretrainedCfg, build, cfg_of_recipe


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


SEGMENTATION = """
extends: base/segmentation.yaml
name: scenes
task: {head: semantic_fpn, norm: group, channels: 32}
model: {name: dat_atto, num_classes: 11, img_size: 64}
geometry: {short_side: 64, long_side: 96, crop: 64}
train: {global_batch: 4, micro_batch: 4, precision: fp32, ema_decay: 0.9, loggers: []}
data: {workers: 0}
schedule: {kind: poly, updates: 2, warmup_updates: 0}
"""


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Scenes of items on a ground, ADE20K's layout: the folder above ``images`` and ``annotations``."""
    folder = tmp_path_factory.mktemp("scenes")
    map_folder(folder, "training", 6, seed=0)
    map_folder(folder, "validation", 5, seed=1)
    return folder


@pytest.fixture(scope="session")
def dense_cfg() -> PretrainedCfg:
    return replace(cfg_of_recipe(loads(SEGMENTATION).config, source="a test"), classes=MAP_NAMES)


@pytest.fixture(scope="session")
def segmenter(dense_cfg) -> Segmenter:
    """That takes scenes for many classes."""
    torch.manual_seed(0)
    model = build(dense_cfg).eval()
    assert isinstance(model, Segmenter)
    torch.nn.init.normal_(model.head.classifier.conv.weight)
    return model


@pytest.fixture(scope="session")
def segmenter_file(tmp_path_factory, segmenter, dense_cfg) -> Path:
    path = tmp_path_factory.mktemp("weights") / "segmenter.safetensors"
    weights.save(path, segmenter.state_dict(), dense_cfg)
    return path


@pytest.fixture(scope="session")
def segmentation_run(tmp_path_factory, scenes) -> Path:
    """A training of two updates with its evaluation."""
    sets = [
        f"data.{key}={scenes / 'images' / split}"
        for key, split in (("train", "training"), ("val", "validation"))
    ]
    return trained(tmp_path_factory.mktemp("runs"), SEGMENTATION, sets)


@pytest.fixture(scope="session")
def object_set(tmp_path_factory) -> Path:
    """Scenes of objects as COCO's JSON: the folder of ``train.json`` and ``val.json``; the first of image 1025 is a crowd."""
    folder = tmp_path_factory.mktemp("objects")
    objects.write(folder, train=24, val=5)
    return folder


@pytest.fixture(scope="session")
def detector_cfg() -> PretrainedCfg:
    config = loads(yaml.safe_dump(objects.RECIPE)).config
    return replace(cfg_of_recipe(config, source="a test"), classes=tuple(objects.CATEGORIES.values()))


@pytest.fixture(scope="session")
def detector(detector_cfg) -> Detector:
    """Mask R-CNN that takes scenes for many objects, whose masks cover much of their boxes."""
    torch.manual_seed(1)
    model = build(detector_cfg).eval()
    assert isinstance(model, Detector)
    masks = model.get_submodule("mask_heads.0.masks")
    with torch.no_grad():
        masks.weight.mul_(0.1)
        masks.bias.add_(2)
    return model


@pytest.fixture(scope="session")
def detector_file(tmp_path_factory, detector, detector_cfg) -> Path:
    path = tmp_path_factory.mktemp("weights") / "detector.safetensors"
    weights.save(path, detector.state_dict(), detector_cfg)
    return path


@pytest.fixture(scope="session")
def detection_run(tmp_path_factory, object_set) -> Path:
    """A training of RetinaNet for two updates with its evaluation, at a score that its objects have."""
    recipe = objects.recipe_of("retinanet")
    recipe["model"]["drop_path"] = 0.0
    recipe["train"] |= {"max_steps": 2, "loggers": []}
    recipe["eval"] |= {"score_threshold": 0.0}
    sets = [f"data.{part}={object_set / part}.json" for part in ("train", "val")]
    return trained(tmp_path_factory.mktemp("runs"), yaml.safe_dump(recipe), sets)


def trained(folder: Path, recipe: str, sets: list[str]) -> Path:
    """The run folder of a recipe (YAML) that was trained."""
    (folder / "recipe.yaml").write_text(recipe)
    # In a process of its own: DeepSpeed keeps the group of the first training of a process, which another test may have ended.
    command = [
        sys.executable,
        "-m",
        "dattrain",
        "train",
        str(folder / "recipe.yaml"),
        *sets,
        "--run",
        str(folder / "run"),
    ]
    done = warm.run(
        command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"
