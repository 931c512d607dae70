"""What every export gives back: the file, and how to run it again; and how that is compared with the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dattrain.data.augment.cpu_transforms import resize_window
from dattrain.data.prepare.arrays import read_idx
from dattrain.models.dense.detector import Detector
from dattrain.pretrained import preprocess
from dattrain.pretrained.pretrained_cfg import Network, PretrainedCfg

EXACT, GRAPH = 1e-6, 1e-3
"""Largest difference of logits that is accepted, relative to their largest. The same numbers may lie otherwise in memory, where
matrix products then sum in another order; graphs have other operators too."""


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how to run it again: images (B x C x H x W) to logits, both on the CPU; a detector as it is."""

    path: Path
    cfg: PretrainedCfg
    run: Callable[[Tensor], Tensor]
    tolerance: float


def compare(model: Network, item: Exported, images: Tensor) -> tuple[float, str]:
    """Largest difference of logits relative to the largest logit, and on how many images the best class (of every pixel) is the same.

    All together and the first alone, so that a graph with a frozen batch size shows. Of a detector everything that its heads give is
    compared, and on how many images the objects are the same.
    """
    if isinstance(model, Detector):
        return _compare_detectors(model, item, images)
    with torch.no_grad():
        expected, found = model(images), item.run(images)
        alone, found_alone = model(images[:1]), item.run(images[:1])
    difference = max(float((found - expected).abs().max()), float((found_alone - alone).abs().max()))
    same = int((found.argmax(1) == expected.argmax(1)).reshape(len(images), -1).all(1).sum())
    return difference / float(expected.abs().max()), f"{same} of {len(images)} images"


def _compare_detectors(model: Detector, item: Exported, images: Tensor) -> tuple[float, str]:
    other = item.run
    assert isinstance(other, Detector)  # no graph is written of one
    sizes = [(images.shape[2], images.shape[3])] * len(images)
    with torch.no_grad():
        outputs = (tree_leaves(each.forward_dummy(images)) for each in (model, other))
        pairs = [(one, two) for one, two in zip(*outputs) if one.numel()]
        expected, found = model(images, sizes), other(images, sizes)
    difference = max(float((one - two).abs().max()) for one, two in pairs)
    same = sum(
        all(
            one[key].shape == two[key].shape and torch.allclose(one[key], two[key], rtol=1e-4, atol=1e-4)
            for key in one
        )
        for one, two in zip(expected, found)
    )
    return difference / max(float(one.abs().max()) for one, _ in pairs), f"{same} of {len(images)} images"


def images_for(cfg: PretrainedCfg, paths: Sequence[str] | None) -> Tensor:
    """Prepared and normalised images: those named, or eight of Fashion-MNIST's test images."""
    if paths:
        pixels = [preprocess.read(path) for path in preprocess.find(paths)]
    else:
        file = resources.files("dattrain") / "demo" / "t10k-images-idx3-ubyte.gz"
        with resources.as_file(file) as path:
            pixels = [preprocess.from_array(image) for image in read_idx(str(path))[:8]]
    if cfg.task == "classification":
        prepared = torch.stack([preprocess.prepare(each, cfg) for each in pixels])
    else:  # of one size, and the smallest that is sure to fit will do
        size = cfg.img_size
        prepared = torch.stack(
            [resize_window(each, size, (0, 0), size, cfg.interpolation) for each in pixels]
        )
    if cfg.in_chans in (1, 3):
        return preprocess.normalise(prepared, cfg)
    # Of other channels (depth, infrared) there are no files here: red, green and blue again and again will do to compare.
    colours = replace(cfg, in_chans=3, mean=cfg.mean[:3], std=cfg.std[:3])
    return preprocess.normalise(prepared, colours)[:, torch.arange(cfg.in_chans) % 3]
