"""Tables and pictures of an evaluation, written to a folder: CSV for every figure, PNG for confusion and reliability."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dattrain.evaluation import metrics
from dattrain.evaluation.metrics import Calibration, Records

CONFUSION_LIMIT = 60
"""Classes in the confusion picture; of more, those with the most errors are shown."""


def write_all(
    folder: Path, records: Records, names: Sequence[str], keys: Sequence[str], title: str
) -> list[Path]:
    """Write per_class.csv, confusion.csv and .png, calibration.csv, reliability.png and predictions.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = metrics.per_class(records, len(names))
    cells = metrics.confusion(records)
    calibration = metrics.calibration(records)
    _table(
        folder / "per_class.csv",
        ["class", "name", "images", "top1", "top5", "precision"],
        (
            [
                r["class"],
                names[int(r["class"])],
                r["images"],
                *(_number(r[k]) for k in ("top1", "top5", "precision")),
            ]
            for r in rows
        ),
    )
    _table(
        folder / "confusion.csv",
        ["label", "label_name", "predicted", "predicted_name", "images"],
        ([a, names[a], b, names[b], n] for a, b, n in cells),
    )
    edges = calibration.edges
    _table(
        folder / "calibration.csv",
        ["from", "to", "images", "confidence", "accuracy"],
        (
            [
                _number(edges[i]),
                _number(edges[i + 1]),
                int(n),
                _number(calibration.confidence[i]),
                _number(calibration.accuracy[i]),
            ]
            for i, n in enumerate(calibration.count)
        ),
    )
    _table(
        folder / "predictions.csv",
        [
            "image",
            "label",
            "right",
            "confidence",
            "nll",
            *(f"top{k + 1}" for k in range(records.top.shape[1])),
        ],
        (
            [
                keys[i] if keys else int(records.index[i]),
                int(records.label[i]),
                int(records.top[i, 0] == records.label[i]),
            ]
            + [_number(records.confidence[i]), _number(records.nll[i]), *records.top[i].tolist()]
            for i in range(len(records))
        ),
    )
    confusion_picture(records, names, title).savefig(folder / "confusion.png")
    reliability_picture(calibration, title).savefig(folder / "reliability.png")
    tables, pictures = ("per_class", "confusion", "calibration", "predictions"), ("confusion", "reliability")
    return [folder / f"{name}.csv" for name in tables] + [folder / f"{name}.png" for name in pictures]


_OF_CLASSES = (
    "class", "name", "iou", "accuracy", "pixels", "predicted",
    "objects", "found", "ap", "ap50", "ar", "mask_ap", "mask_ap50", "mask_ar",
)  # fmt: skip


def write_classes(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write ``per_class.csv`` of ``evaluation.segmentation`` (IoU and accuracy in percent, pixels) or ``detection`` (APs in percent, objects).

    Columns are those of ``_OF_CLASSES`` that the rows have.
    """
    folder.mkdir(parents=True, exist_ok=True)
    head = [key for key in _OF_CLASSES if any(key in row for row in rows)]
    path = folder / "per_class.csv"
    _table(path, head, [["" if row[key] is None else row[key] for key in head] for row in rows])
    return path


def confusion_picture(records: Records, names: Sequence[str], title: str) -> Figure:
    """Shares of each class's images by predicted class; of many classes, those that are confused most."""
    known = records.label >= 0
    labels, predicted = records.label[known], records.top[known, 0]
    shown = np.unique(np.concatenate([labels, predicted]))
    note = ""
    if len(shown) > CONFUSION_LIMIT:
        wrong = labels != predicted
        errors = np.bincount(np.concatenate([labels[wrong], predicted[wrong]]), minlength=len(names))
        note = f" (the {CONFUSION_LIMIT} most confused of {len(shown)})"
        shown = np.sort(np.argsort(errors, kind="stable")[::-1][:CONFUSION_LIMIT])
    place = np.full(len(names), -1)
    place[shown] = np.arange(len(shown))
    matrix = np.zeros((len(shown), len(shown)))
    inside = (place[labels] >= 0) & (place[predicted] >= 0)
    np.add.at(matrix, (place[labels[inside]], place[predicted[inside]]), 1)
    totals = np.bincount(labels, minlength=len(names))[shown]
    share = 100 * matrix / np.maximum(totals, 1)[:, None]
    side = 2.6 + 0.24 * len(shown)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="magma_r", vmin=0, vmax=100)
    text = [_short(names[i]) for i in shown]
    axes.set_xticks(range(len(shown)), text, rotation=90, fontsize=7, parse_math=False)
    axes.set_yticks(range(len(shown)), text, fontsize=7, parse_math=False)
    axes.set(xlabel="predicted", ylabel="label")
    axes.set_title(f"{title}{note}", fontsize=9, parse_math=False)
    if len(shown) <= 20:
        for (row, column), value in np.ndenumerate(share):
            if value >= 0.5:
                colour = "white" if value > 45 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6, color=colour)
    figure.colorbar(image, ax=axes, shrink=0.7, label="% of the label's images")
    return figure


def reliability_picture(calibration: Calibration, title: str) -> Figure:
    """Accuracy against confidence by bin, and how many images each bin holds."""
    figure = Figure(figsize=(4.6, 5.2), layout="constrained", dpi=120)
    upper, lower = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    edges, width = calibration.edges, calibration.edges[1] - calibration.edges[0]
    middle = (edges[:-1] + edges[1:]) / 2
    some = calibration.count > 0
    upper.bar(
        middle[some],
        calibration.accuracy[some],
        width,
        color="#18a8ff",
        edgecolor="black",
        linewidth=0.5,
        label="accuracy",
    )
    upper.plot(
        calibration.confidence[some],
        calibration.accuracy[some],
        "o",
        color="#ff5a36",
        markersize=4,
        label="at the mean confidence",
    )
    upper.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    upper.set_title(f"{title}: ECE {100 * calibration.ece:.2f} %", fontsize=9, parse_math=False)
    upper.legend(fontsize=8)
    lower.bar(middle, calibration.count, width, color="grey", edgecolor="black", linewidth=0.5)
    lower.set(xlabel="confidence", ylabel="images")
    return figure


def _table(path: Path, header: list[str], rows: object) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)  # type: ignore[arg-type]


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.6g}"


def _short(name: str) -> str:
    first = name.split(",")[0]
    return first if len(first) <= 22 else first[:21] + "…"
