"""Pictures of deformable attention with matplotlib, on figures of their own (no pyplot, no global state).

The layouts follow Xia et al., CVPR 2022, figures 4 to 7: points over the image with their size by the attention received,
shifts from the reference grid, and the keys that a query reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dattrain.visualize.picture import Picture, as_picture
from dattrain.visualize.sampling_points import Deformed, token_at

COLOURS = ("#ff5a36", "#18a8ff", "#ffd21f", "#3ddc84", "#c86bff", "#ff7ac2", "#00d5c8", "#ffffff")
"""One per offset group, told apart on photographs; repeated beyond eight groups."""


def show_image(axes: Axes, image: np.ndarray | Picture) -> Picture:
    """Put an image (H x W x 3 uint8, or a ``Picture``) on the axes, in pixels whose centres are at .5, without ticks.

    What the network did not see of it is dimmed.
    """
    picture = as_picture(image)
    height, width = picture.pixels.shape[:2]
    axes.imshow(
        picture.pixels,
        extent=(0, width, height, 0),
        interpolation="nearest" if height < 128 else "antialiased",
    )
    if not picture.whole:
        top, left, rows, columns = picture.window
        for corner, across, down in (
            ((0, 0), width, top),
            ((0, top + rows), width, height - top - rows),
            ((0, top), left, rows),
            ((left + columns, top), width - left - columns, rows),
        ):
            axes.add_patch(Rectangle(corner, across, down, facecolor="black", alpha=0.55, linewidth=0))
    axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    return picture


def points(
    axes: Axes,
    image: np.ndarray | Picture,
    block: Deformed,
    groups: Sequence[int] | None = None,
    *,
    area: float = 16.0,
) -> None:
    """Sampling points of the groups (all when None); where attention was captured, area is proportional to it.

    Args:
        image: H x W x 3 uint8, which the network saw all of; or a ``Picture``.
        area: mean area of a point, in square typographic points.
    """
    picture = show_image(axes, image)
    for group in range(block.groups) if groups is None else groups:
        yx = picture.place(block, block.positions[group].reshape(-1, 2))
        sizes = np.full(len(yx), area)
        if block.attention is not None or block.weights is not None:
            sizes = area * block.received(group) * len(yx)
        axes.scatter(
            yx[:, 1],
            yx[:, 0],
            s=sizes,
            c=COLOURS[group % len(COLOURS)],
            edgecolors="black",
            linewidths=0.3,
            alpha=0.85,
            clip_on=picture.padded,
        )


def offsets(
    axes: Axes, image: np.ndarray | Picture, block: Deformed, groups: Sequence[int] | None = None
) -> None:
    """Arrows from the reference points to the sampling points of each group."""
    picture = show_image(axes, image)
    start = picture.place(block, block.reference.reshape(-1, 2))
    for group in range(block.groups) if groups is None else groups:
        end = picture.place(block, block.positions[group].reshape(-1, 2))
        colour = COLOURS[group % len(COLOURS)]
        axes.scatter(start[:, 1], start[:, 0], s=4, facecolors="none", edgecolors="white", linewidths=0.5)
        axes.quiver(
            start[:, 1],
            start[:, 0],
            end[:, 1] - start[:, 1],
            end[:, 0] - start[:, 0],
            angles="xy",
            scale_units="xy",
            scale=1,
            color=colour,
            width=0.004,
        )


def attention(
    axes: Axes,
    image: np.ndarray | Picture,
    block: Deformed,
    group: int,
    query: tuple[float, float],
    *,
    keys: int = 49,
) -> None:
    """Lines from a query to the keys it attends to most, opacity and width by the weight (mean over the group's heads).

    Args:
        query: (y, x) as fractions of what the network saw, without padding; the token that holds it is the query. A block with
            ``weights`` instead of all attention shows those, which are to be this query's.
        keys: how many lines at most.
    """
    picture = show_image(axes, image)
    row = query_index(block, picture.within(query))
    weights = block.group_attention(group)[row] if block.weights is None else block.weights[group]
    yx = picture.place(block, block.positions[group].reshape(-1, 2))
    order = np.argsort(weights)[::-1][:keys][::-1]
    strength = weights[order] / weights.max()
    height, width = block.map_size
    start = (np.array([row // width, row % width]) + 0.5) * picture.window[2:] / (height, width)
    start += picture.window[:2]
    colour = COLOURS[group % len(COLOURS)]
    lines = [[(start[1], start[0]), (x, y)] for y, x in yx[order]]
    axes.add_collection(
        LineCollection(
            lines, colors=colour, linewidths=0.3 + 2.2 * strength, alpha=(0.1 + 0.85 * strength).tolist()
        )
    )
    axes.scatter(
        yx[order, 1],
        yx[order, 0],
        s=4 + 40 * strength,
        c=colour,
        edgecolors="black",
        linewidths=0.3,
        alpha=0.9,
    )
    axes.scatter(start[1], start[0], marker="*", s=120, c="red", edgecolors="white", linewidths=0.8, zorder=5)


def query_index(block: Deformed, query: tuple[float, float]) -> int:
    """The token (row-major) that holds the point (y, x) given as fractions of what the network saw."""
    return token_at(query, block.map_size)


def sheet(
    kind: str, image: np.ndarray | Picture, blocks: Sequence[Deformed], query: tuple[float, float], title: str
) -> Figure:
    """One figure of an image: a row per block; a column of all groups together (points, offsets), then one per group."""
    together = kind in ("points", "offsets")
    columns = max(b.groups for b in blocks) + together
    if together and columns == 2:
        columns = 1
    height, width = as_picture(image).pixels.shape[:2]
    row = 2.6 * min(max(height / width, 0.4), 2.0) + 0.15
    figure = Figure(figsize=(2.6 * columns, row * len(blocks) + 0.5), layout="constrained", dpi=120)
    grid = figure.subplots(len(blocks), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, block in zip(grid, blocks):
        views: list[tuple[str, list[int]]] = [(f"group {g + 1}", [g]) for g in range(block.groups)]
        if together:
            views = [("all groups", list(range(block.groups)))] + (views if block.groups > 1 else [])
        for axes, (name, groups) in zip(row, views):
            axes.set_axis_on()
            axes.set_title(f"stage {block.stage}, block {block.block}: {name}", fontsize=8)
            if kind == "points":
                points(axes, image, block, groups)
            elif kind == "offsets":
                offsets(axes, image, block, groups)
            else:
                attention(axes, image, block, groups[0], query)
    figure.suptitle(title, fontsize=9, parse_math=False)
    return figure
