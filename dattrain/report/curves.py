"""Rows of ``metrics.jsonl`` as the curves of a page: few enough points for a browser, with the range that each stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

POINTS = 600
"""Of a curve at most; each stands for as many updates in a row."""


@dataclass(frozen=True)
class Panel:
    """A chart: its title, unit, and the names of what is drawn in it, by the keys of the rows. ``factor`` is to the unit."""

    title: str
    unit: str
    series: Mapping[str, str]
    factor: float = 1.0
    log: bool = False
    """A logarithmic axis can be useful."""


_CASCADE = {"cls": "classes", "bbox": "boxes", "mask": "masks"}
PANELS = (
    Panel(
        "Loss", "nats",
        {
            "loss": "training", "eval_loss": "evaluation", "ema_loss": "evaluation, averaged weights",
            "loss_aux": "training, auxiliary head",
        },
        log=True,
    ),
    Panel(
        "Accuracy", "%",
        {"top1": "top-1", "top5": "top-5", "ema_top1": "top-1, averaged weights", "ema_top5": "top-5, averaged weights"},
    ),
    Panel(
        "Segmentation", "%",
        {
            "miou": "mIoU", "macc": "mAcc", "aacc": "aAcc", "ema_miou": "mIoU, averaged weights",
        },
    ),
    Panel(
        "Detection", "%",
        {
            "ap": "AP", "ap50": "AP50", "mask_ap": "AP of masks", "mask_ap50": "AP50 of masks", "ema_ap": "AP, averaged weights",
            "ema_mask_ap": "AP of masks, averaged weights",
        },
    ),
    Panel(
        "Parts of the loss", "",
        {
            "loss_rpn_cls": "RPN, objectness", "loss_rpn_bbox": "RPN, boxes", "loss_cls": "classes", "loss_bbox": "boxes", "loss_mask": "masks",
            **{f"s{n}_loss_{part}": f"stage {n + 1}, {name}" for n in range(3) for part, name in _CASCADE.items()},
        },
        log=True,
    ),
    Panel("Learning rate", "", {"lr": "learning rate"}, log=True),
    Panel("Throughput", "images/s", {"images_per_s": "images/s"}),
    Panel("Waiting for data", "% of the time", {"data_wait": "waiting"}, factor=100),
    Panel("Gradient norm", "", {"grad_norm": "gradient norm"}, log=True),
)  # fmt: skip


TASKS = ("Accuracy", "Segmentation", "Detection", "Parts of the loss")
"""Titles of those that one task has."""


def panels(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per panel its curves that have values: ``name``, ``step``, ``value``, and ``low``, ``high`` where a point is of many rows."""
    return [
        {
            "title": panel.title,
            "unit": panel.unit,
            "log": panel.log,
            "curves": [
                {"name": name, **thinned(found, panel.factor)}
                for key, name in panel.series.items()
                if (found := values(rows, key))
            ],
        }
        for panel in PANELS
    ]


def values(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of the rows that have a finite number there."""
    return [
        (int(row["step"]), float(value))
        for row in rows
        if isinstance(value := row.get(key), (int, float)) and math.isfinite(value) and "step" in row
    ]


def thinned(found: Sequence[tuple[int, float]], factor: float = 1.0) -> dict[str, list[float]]:
    """``POINTS`` means at most of equally many values, at the last step of each, with the smallest and the largest."""
    size = max(1, math.ceil(len(found) / POINTS))
    # From the end, so that the last point is the last value's.
    parts = [found[max(0, end - size) : end] for end in range(len(found), 0, -size)][::-1]
    curve: dict[str, list[float]] = {
        "step": [part[-1][0] for part in parts],
        "value": [_short(factor * sum(v for _, v in part) / len(part)) for part in parts],
    }
    if size > 1:
        curve["low"] = [_short(factor * min(v for _, v in part)) for part in parts]
        curve["high"] = [_short(factor * max(v for _, v in part)) for part in parts]
    return curve


def _short(value: float) -> float:
    return float(f"{value:.5g}")
