"""Where a detector looked for what it found: the paper's Figure 4 (Xia et al., CVPR 2022) of one's own picture.

Sampling points of stage 3 and of stage 4 lie over boxes and masks, two groups of each stage in orange and in yellow. Every point of a
group's grid is drawn; its area is the attention that the queries within the objects give it (of all queries, where nothing was
found), so that of the thousands which a large image has those stand out that mattered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dattrain.models.dense.detector import Detector
from dattrain.pretrained import preprocess
from dattrain.pretrained.detect import Detection
from dattrain.pretrained.pretrained_cfg import PretrainedCfg
from dattrain.visualize import draw
from dattrain.visualize.picture import Picture, picture_of
from dattrain.visualize.sampling_points import Deformed, Place, attended, select

STAGES = (3, 4)
COLOURS = ("#ff8c1a", "#ffe81a")
"""Of the first two groups of a stage: orange and yellow."""
_COVERED, _LARGEST = 0.05, 0.0025
"""Area of a group's points together, and of one point at most, as shares of the picture's."""
LONGEST = 640
"""Pixels that a picture's longer side has at least where words stand on it."""
_WIDTH, _DPI = 6.0, 150
"""Inches of a panel, and pixels of an inch."""
_NARROWEST, _LOWEST = 2.6, 0.6
"""Inches of a panel at least, so that its title has room whatever the picture's shape."""


def sheet(model: Detector, cfg: PretrainedCfg, found: Detection, title: str = "") -> Figure:
    """Three panels beside each other: what was found, and the points of stage 3 and of stage 4 over it (of one, where the other has none).

    Args:
        model: in evaluation mode.
        cfg: as ``load_model`` gives it beside the model.
        found: what it found (``detect``).

    Raises:
        UserError: the model has no deformable attention in these stages.
    """
    blocks = points_of(model, cfg, found)
    plain, named = (
        picture_of(preprocess.from_array(overlay), cfg)
        for overlay in (found.overlay(text=False), found.overlay(longest=LONGEST))
    )
    height, width = plain.pixels.shape[:2]
    # Portraits are as high as they may be, not as wide.
    row = _WIDTH * min(height / width, 1.25)
    row, panel = max(row, _LOWEST), max(row * width / height, _NARROWEST)
    figure = Figure(figsize=(panel * (len(blocks) + 1), row + 0.4), layout="constrained", dpi=_DPI)
    first, *others = np.atleast_1d(figure.subplots(1, len(blocks) + 1)).flat
    draw.show_image(first, named)
    first.set_title(title, fontsize=9, parse_math=False)
    for axes, block in zip(others, blocks):
        draw.show_image(axes, plain)
        _points(axes, plain, block, (72 * panel) * (72 * row))
        groups = f"groups 1 and 2 of {block.groups}" if block.groups > 1 else "its one group"
        axes.set_title(f"stage {block.stage}, block {block.block}: {groups}", fontsize=9)
    return figure


def points_of(model: Detector, cfg: PretrainedCfg, found: Detection) -> list[Deformed]:
    """The last deformable block of stages 3 and 4, with what the queries within the objects attend to. Raises as ``sheet``."""

    def choose(places: Sequence[Place]) -> list[Place]:
        last = [place for place in select(places) if place.stage in STAGES]
        return last or select(places, stage=STAGES[0])  # which says what there is

    image = preprocess.from_array(found.pixels)
    x = preprocess.model_input(preprocess.prepare(image, cfg), cfg, next(model.parameters()).device)
    return attended(model.backbone, x, _queries(picture_of(image, cfg), found), choose)


def _queries(picture: Picture, found: Detection) -> Callable[[int, int], Tensor]:
    """1 for each token of a map whose centre lies in an object (its mask, else its box), or in the image where none does."""
    height, width = found.pixels.shape[:2]
    inside = found.covered()
    shown = picture.pixels.shape[:2]
    extent = [seen * side / small for seen, side, small in zip(picture.window[2:], (height, width), shown)]

    def weights(rows: int, columns: int) -> Tensor:
        y, x = (
            ((np.arange(count) + 0.5) / count * whole).astype(int)
            for count, whole in zip((rows, columns), extent)
        )
        within = (y < height)[:, None] & (x < width)
        chosen = within & inside[np.ix_(y.clip(max=height - 1), x.clip(max=width - 1))]
        return torch.from_numpy((chosen if chosen.any() else within).reshape(-1).astype(np.float32))

    return weights


def _points(axes: Axes, picture: Picture, block: Deformed, area: float) -> None:
    """The points of up to two groups; ``area`` is the panel's, in square typographic points."""
    for group, colour in zip(range(block.groups), COLOURS):
        yx = picture.place(block, block.positions[group].reshape(-1, 2))
        sizes = np.minimum(_COVERED * area * block.received(group), _LARGEST * area)
        axes.scatter(
            yx[:, 1], yx[:, 0], s=sizes, c=colour, edgecolors="black", linewidths=0.25, alpha=0.9, zorder=3
        )  # fmt: skip
