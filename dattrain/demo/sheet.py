"""The picture at the end of the demos of dense prediction: the trainings' curves above scenes, their truth, and what each training finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from dattrain.data.decode.images import decode
from dattrain.data.source.dataset import Dataset, Sample, locate, open_dataset
from dattrain.observe import metrics

SHOWN = 7
"""Scenes that are drawn: the first ones."""
Pixels = NDArray[np.uint8]
"""H x W x 3."""


def scenes(
    spec: str, truth: Callable[[Dataset, Sample, Pixels], Pixels]
) -> tuple[list[Pixels], list[Pixels], list[str]]:
    """The first scenes of a set, the same under their truth as ``truth`` draws it, and the names of the set's classes."""
    dataset = open_dataset(spec)
    samples = [dataset.read(*locate(dataset, item)) for item in range(SHOWN)]
    images = [decode(sample.data).permute(1, 2, 0).numpy() for sample in samples]
    drawn = [truth(dataset, sample, image) for sample, image in zip(samples, images)]
    dataset.close()
    return images, drawn, list(dataset.classes or ())


def draw(
    file: Path,
    runs: Mapping[str, Path],
    metric: tuple[str, str],
    loss: str,
    rows: Sequence[Sequence[Pixels]],
    legend: Mapping[str, Any],
) -> None:
    """Write the picture.

    Args:
        runs: run folders by their titles.
        metric: its key in ``metrics.jsonl``, and what it is called.
        loss: what the loss is called.
        rows: scenes, their truth, and what each run finds in them.
        legend: colours by the names of classes.
    """
    heights = 3.7, 1.85 * len(rows)
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
    curves, sheet = np.asarray(figure.subfigures(2, 1, height_ratios=heights))
    axes = curves.subplots(1, 2)
    for title, folder in runs.items():
        read = metrics.read(folder)
        for axis, key, style in zip(axes, ("loss", metric[0]), ("-", "o-")):
            axis.plot(*zip(*[(row["samples"], row[key]) for row in read if key in row]), style, label=title)
    for axis, label in zip(axes, (loss, metric[1])):
        axis.set(xlabel="scenes seen", ylabel=label)
    axes[1].legend(loc="lower right")
    grid = sheet.subplots(len(rows), SHOWN)
    for line, images, title in zip(grid, rows, ("scene", "truth", *runs)):
        line[0].set_ylabel(title.replace(", ", ",\n"), fontsize=9)
        for axis, image in zip(line, images):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
    sheet.legend(
        handles=[Patch(facecolor=colour, edgecolor="black", label=name) for name, colour in legend.items()],
        loc="outside lower center",
        ncols=len(legend),
        fontsize=8,
    )
    figure.savefig(file, dpi=110)
