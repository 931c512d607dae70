"""Metrics of semantic segmentation from a matrix of counts. Pure: tensors and numbers in, numbers out.

The definitions are mmsegmentation's (``mmseg/core/evaluation/metrics.py``, 0.29): void pixels of the truth count nowhere, also
not as predictions; over one matrix of the whole set, a class's IoU is intersection / union and its accuracy is
intersection / truth; the means leave out the classes for which these are not defined, 0 / 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dattrain.data.annotations.semantic import VOID


def confusion(truth: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Pixels by true and by predicted class: num_classes x num_classes int64, on the maps' device.

    Args:
        truth: class of each pixel, any shape, integers; ``VOID`` where there is none. No other number from ``num_classes`` on.
        predicted: of the same shape; below ``num_classes``.
    """
    rows = truth.reshape(-1).long()
    cells = rows * num_classes + predicted.reshape(-1).long()
    # Void has a cell of its own behind the matrix, so that nothing is selected: the host would wait for how many there are.
    last = num_classes * num_classes
    cells = torch.where(rows == VOID, last, cells)
    return torch.bincount(cells, minlength=last + 1)[:last].view(num_classes, num_classes)


@dataclass(frozen=True)
class Scores:
    """What a matrix of counts says; percent, per class and in the mean."""

    iou: NDArray[np.float64]
    """Of each class; nan where it is neither in the truth nor in the prediction."""
    accuracy: NDArray[np.float64]
    """Share of each class's pixels that are predicted as it; nan where it is not in the truth."""
    miou: float
    macc: float
    aacc: float
    """Share of all labelled pixels that are right. The three are nan where no pixel has a class."""


def scores(matrix: Tensor | NDArray[np.int64]) -> Scores:
    """The metrics of a matrix of ``confusion``, or of the sum of such."""
    counts = np.asarray(matrix.cpu() if isinstance(matrix, Tensor) else matrix).astype(np.float64)
    right, truth, predicted = np.diagonal(counts), counts.sum(1), counts.sum(0)
    with np.errstate(invalid="ignore"):
        iou = 100 * right / (truth + predicted - right)
        accuracy = 100 * right / truth
        total = 100 * right.sum() / counts.sum()
    return Scores(iou, accuracy, _mean(iou), _mean(accuracy), float(total))


def _mean(values: NDArray[np.float64]) -> float:
    """Mean of those that are numbers."""
    found = values[~np.isnan(values)]
    return float(found.mean()) if len(found) else math.nan
