"""``results.png``: the curves of one run or several, for where a page is too much."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from dattrain.files import replacing
from dattrain.observe import metrics
from dattrain.report import curves
from dattrain.text import one_line

FILE = "results.png"
COLOURS = ("#0069b4", "#c8500a", "#00805c", "#a0459b", "#7a6200", "#00707f", "#b3324f", "#555555")
"""Of runs, or of the curves of one; told apart by colour-blind eyes too, and on white."""
_STYLES = ("-", "--", ":", "-.")


class _Plain(LogFormatter):
    """Labels the ticks that matplotlib would, with 2.2 where it has a power of ten times 2.2."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def write(path: Path, runs: Sequence[Path], titles: Sequence[str] = ()) -> None:
    """Draw ``picture`` into a file. Raises OSError where it cannot be written."""
    with replacing(path) as part:
        picture(runs, [one_line(each) for each in titles or [run.absolute().name for run in runs]]).savefig(
            part, format="png"
        )


def picture(runs: Sequence[Path], titles: Sequence[str]) -> Figure:
    """A panel for each of ``curves.PANELS``; runs have colours of their own, the curves of one in a panel other lines.

    Of tasks that none of the runs is of there is none.
    """
    tables = [curves.panels(metrics.read(run)) for run in runs]
    numbers = [
        n
        for n, panel in enumerate(curves.PANELS)
        if panel.title not in curves.TASKS or any(table[n]["curves"] for table in tables)
    ]
    figure = Figure(figsize=(13 * -(-len(numbers) // 2) / 3, 7.4), layout="constrained", dpi=110)
    grid = list(figure.subplots(2, -(-len(numbers) // 2)).flat)
    for empty in grid[len(numbers) :]:
        empty.set_axis_off()
    for axes, number in zip(grid, numbers):
        panel = curves.PANELS[number]
        positive = True
        for which, (title, table) in enumerate(zip(titles, tables)):
            for place, curve in enumerate(table[number]["curves"]):
                colour = COLOURS[(which if len(runs) > 1 else place) % len(COLOURS)]
                few = (
                    "o"
                    if len(curve["step"]) <= 60 and len(runs) * len(table[number]["curves"]) <= 8
                    else None
                )
                label = f"{title}: {curve['name']}" if len(runs) > 1 else curve["name"]
                axes.plot(
                    curve["step"], curve["value"], _STYLES[place % len(_STYLES)], color=colour, label=label,
                    linewidth=1.4, marker=few, markersize=3,
                )  # fmt: skip
                if "low" in curve:
                    axes.fill_between(
                        curve["step"], curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0
                    )
                positive = positive and min(curve.get("low", curve["value"])) > 0
        if panel.log and positive and axes.lines and panel.title != "Learning rate":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(_Plain())
            axes.yaxis.set_minor_formatter(_Plain())
        axes.set_title(f"{panel.title}, {panel.unit}" if panel.unit else panel.title, fontsize=10)
        axes.set_xlabel("updates", fontsize=8)
        axes.tick_params(labelsize=8, which="both")
        axes.grid(alpha=0.25)
        if len(axes.lines) > 1:
            for text in axes.legend(fontsize=7).get_texts():
                text.set_parse_math(False)
    figure.suptitle(", ".join(titles), fontsize=11, parse_math=False)
    return figure
