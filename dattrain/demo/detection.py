"""What ``dattrain demo detect`` shows at its end: the trainings' curves, and scenes with their truth and what each finds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from dattrain.data.annotations import instances
from dattrain.data.decode.images import decode
from dattrain.data.source.dataset import locate, open_dataset
from dattrain.drawing import Shape, colour, draw
from dattrain.observe import metrics
from dattrain.pretrained.detect import detect
from dattrain.pretrained.weights import load_model

SHOWN = 7
"""Scenes that are drawn: the first ones."""


def picture(file: Path, runs: Mapping[str, Path], val: str) -> None:
    """Loss and AP50 of the runs, by their titles, above scenes of ``val``, their truth, and what each run finds in them."""
    figure = Figure(figsize=(12, 13), layout="constrained")
    curves, sheet = np.asarray(figure.subfigures(2, 1, height_ratios=(1, 2.4)))
    loss, ap = curves.subplots(1, 2)
    for title, folder in runs.items():
        rows = metrics.read(folder)
        for axis, key, style in ((loss, "loss", "-"), (ap, "ap50", "o-")):
            axis.plot(*zip(*[(row["samples"], row[key]) for row in rows if key in row]), style, label=title)
    loss.set(xlabel="scenes seen", ylabel="training loss (each head has its own)")
    ap.set(xlabel="scenes seen", ylabel="AP50 of boxes on scenes of unseen items, %")
    ap.legend(loc="lower right")

    pixels, truth, names = _scenes(val, SHOWN)
    grid = sheet.subplots(2 + len(runs), SHOWN)
    for row, drawn in zip(grid, (pixels, truth)):
        for axis, image in zip(row, drawn):
            axis.imshow(image)
    for row, folder in zip(grid[2:], runs.values()):
        model, cfg = load_model(folder)
        for axis, found in zip(row, detect(model, cfg, pixels)):
            axis.imshow(found.overlay(text=False))
    for row, title in zip(grid, ("scene", "truth", *runs)):
        row[0].set_ylabel(title.replace(", ", ",\n"), fontsize=9)
    for axis in grid.flat:
        axis.set(xticks=[], yticks=[])
    sheet.legend(
        handles=[
            Patch(facecolor="#" + bytes(colour(number)).hex(), edgecolor="black", label=name)
            for number, name in enumerate(names)
        ],
        loc="outside lower center",
        ncols=len(names),
        fontsize=8,
    )
    figure.savefig(file, dpi=110)


def _scenes(spec: str, count: int) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]], list[str]]:
    """The first ``count`` images of a set (H x W x 3), the same under their objects, and the names of the classes."""
    dataset = open_dataset(spec)
    pixels, truth = [], []
    for item in range(count):
        sample = dataset.read(*locate(dataset, item))
        image = decode(sample.data).permute(1, 2, 0).numpy()
        found = instances.parse(sample.annotation, sample.where)
        pixels.append(image)
        truth.append(
            draw(
                image,
                [
                    # The set's own classes begin with the background, a detector's do not.
                    Shape(
                        (x, y, x + width, y + height),
                        number - 1,
                        mask=None
                        if segmentation is None
                        else instances.mask(segmentation, image.shape[:2], sample.where),
                    )
                    for (x, y, width, height), number, segmentation in zip(
                        found.boxes.tolist(), found.classes.tolist(), found.segmentations
                    )
                ],
            )
        )
    dataset.close()
    return pixels, truth, list(dataset.classes or ())[1:]
