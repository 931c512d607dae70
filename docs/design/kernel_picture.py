"""Draws kernel.svg: where a query and a key meet the bias table, and why two short vectors say it all.

python docs/design/kernel_picture.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIZE = 5
KEY = (1.35, 2.6)  # row, column on the map of queries, in pixels
CASES = (
    ("corner: a step is one cell,\nfractions belong to the key", 1.0),
    (
        f"center: a step is (H-1)/H = {(SIZE - 1) / SIZE} cells,\nfractions drift, axis by axis",
        (SIZE - 1) / SIZE,
    ),
)


def main() -> None:
    """Write the picture beside this file."""
    figure, (left, *tables) = plt.subplots(1, 3, figsize=(13, 4.6), layout="constrained")
    left.set_title("map: 5 x 5 queries, one key that was moved\noff the grid by its offset", fontsize=10)
    for row in range(SIZE):
        for column in range(SIZE):
            left.plot(column, row, "s", color="C0", markersize=9)
            left.plot([column, KEY[1]], [row, KEY[0]], color="0.85", zorder=0)
    left.plot(KEY[1], KEY[0], "*", color="C3", markersize=17)
    for axes, (title, step) in zip(tables, CASES):
        axes.set_title(f"that key's readings of one head's 9 x 9 table\n{title}", fontsize=10)
        for index in range(2 * SIZE - 1):
            axes.axhline(index, color="0.88", linewidth=0.8, zorder=0)
            axes.axvline(index, color="0.88", linewidth=0.8, zorder=0)
        rows = [(SIZE - 1 - KEY[0] * step) + i * step for i in range(SIZE)]
        columns = [(SIZE - 1 - KEY[1] * step) + j * step for j in range(SIZE)]
        for row in rows:
            axes.plot(columns, [row] * SIZE, "s", color="C0", markersize=6)
        axes.plot([-0.7] * SIZE, rows, ">", color="C2", markersize=7, clip_on=False)
        axes.plot(columns, [-0.7] * SIZE, "v", color="C1", markersize=7, clip_on=False)
        axes.set_xlim(-1, 2 * SIZE - 1.5)
        axes.set_ylim(-1, 2 * SIZE - 1.5)
        axes.set_xlabel(
            "orange: column index, from (key, query column)\ngreen: row index, from (key, query row)",
            fontsize=9,
        )
    for axes in (left, *tables):
        axes.set_aspect("equal")
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    figure.savefig(Path(__file__).with_name("kernel.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
