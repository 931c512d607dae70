"""What ``dattrain demo segment`` shows at its end: the two trainings' curves, and scenes with their truth and both predictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from dattrain.data.annotations.semantic import semantic_map
from dattrain.data.decode.images import decode
from dattrain.data.source.dataset import locate, open_dataset
from dattrain.models.dense.segmenter import Segmenter
from dattrain.observe import metrics
from dattrain.palette import is_background, overlay, palette
from dattrain.pretrained.segment import segment
from dattrain.pretrained.weights import load_model

SHOWN = 7
"""Scenes that are drawn: the first ones."""


def picture(file: Path, segmented: Path, scratch: Path, val: str) -> None:
    """Loss and mIoU of both runs above scenes of ``val``, their truth, and what either network makes of them."""
    figure = Figure(figsize=(12, 11), layout="constrained")
    curves, sheet = np.asarray(figure.subfigures(2, 1, height_ratios=(1, 2)))
    loss, miou = curves.subplots(1, 2)
    runs = (("from classification weights", segmented), ("from random weights", scratch))
    for name, folder in runs:
        rows = metrics.read(folder)
        for axis, key, style in ((loss, "loss", "-"), (miou, "miou", "o-")):
            axis.plot(*zip(*[(row["samples"], row[key]) for row in rows if key in row]), style, label=name)
    loss.set(xlabel="scenes seen", ylabel="training loss")
    miou.set(xlabel="scenes seen", ylabel="mIoU on scenes of unseen items, %")
    miou.legend(loc="lower right")

    pixels, truth, names = _scenes(val, SHOWN)
    grid = sheet.subplots(4, SHOWN)
    for axis, image in zip(grid[0], pixels):
        axis.imshow(image)
    for axis, image, numbers in zip(grid[1], pixels, truth):
        axis.imshow(overlay(image, numbers, names))
    for row, (_, folder) in zip(grid[2:], runs):
        model, cfg = load_model(folder)
        assert isinstance(model, Segmenter)
        for axis, found in zip(row, segment(model, cfg, pixels)):
            axis.imshow(found.overlay())
    for row, title in zip(grid, ("scene", "truth", *(name for name, _ in runs))):
        row[0].set_ylabel(title, fontsize=9)
    for axis in grid.flat:
        axis.set(xticks=[], yticks=[])
    sheet.legend(
        handles=[
            Patch(facecolor="none" if is_background(name) else colour, edgecolor="black", label=name)
            for colour, name in zip(palette(len(names)) / 255, names)
        ],
        loc="outside lower center",
        ncols=len(names),
        fontsize=8,
    )
    figure.savefig(file, dpi=110)


def _scenes(spec: str, count: int) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]], list[str]]:
    """The first ``count`` images of a set (H x W x 3), their maps of classes (H x W), and the classes' names."""
    dataset = open_dataset(spec)
    images, truth = [], []
    for item in range(count):
        sample = dataset.read(*locate(dataset, item))
        pixels = decode(sample.data).permute(1, 2, 0).numpy()
        images.append(pixels)
        truth.append(semantic_map(sample.annotation, pixels.shape[:2], dataset.numbers, sample.where))
    dataset.close()
    return images, truth, list(dataset.classes or ())
