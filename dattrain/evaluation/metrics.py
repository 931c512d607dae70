"""What an evaluation keeps of each image, and the metrics computed from that: pure functions on arrays.

Kept per image are the five best classes, the confidence and the loss, never the logits, so that a 22K head over a large
validation set costs megabytes. Pictures of them are in ``charts``, the loop is in ``inference``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from dattrain.errors import UserError

TOP = 5


@dataclass(frozen=True)
class Records:
    """One row per image, in any order.

    ``index`` int64 (N,): place in the data set. ``label`` int64 (N,): -1 where there is none. ``top`` int64 (N, k), best
    first, k = min(5, classes). ``confidence`` float64 (N,): softmax probability of the best. ``nll`` float64 (N,):
    cross-entropy in nats, NaN without a label. ``brier`` float64 (N,): sum over classes of (p - onehot)^2.
    """

    index: np.ndarray
    label: np.ndarray
    top: np.ndarray
    confidence: np.ndarray
    nll: np.ndarray
    brier: np.ndarray

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class Calibration:
    """Guo et al. 2017 (arXiv 1706.04599): equal-width bins of confidence.

    Per bin: ``count``, ``confidence`` and ``accuracy`` (means, NaN where empty). ``ece`` is the mean gap weighted by
    count, ``mce`` the largest gap of a bin.
    """

    edges: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    ece: float
    mce: float


def record(probabilities: Tensor, labels: Tensor, index: Tensor) -> Records:
    """Keep what is needed of a batch. ``probabilities`` B x classes, ``labels`` and ``index`` B; labels -1: unknown."""
    p = probabilities.double()
    confidence, top = p.topk(min(TOP, p.shape[1]), dim=1)
    known = labels >= 0
    own = p.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    brier = p.square().sum(1) - 2 * own + 1
    unknown = torch.full_like(own, torch.nan)
    return Records(
        index=index.cpu().numpy(),
        label=labels.cpu().numpy(),
        top=top.cpu().numpy(),
        confidence=confidence[:, 0].cpu().numpy(),
        nll=torch.where(known, -own.clamp(min=torch.finfo(torch.float64).tiny).log(), unknown).cpu().numpy(),
        brier=torch.where(known, brier, unknown).cpu().numpy(),
    )


def join(parts: Iterable[Records]) -> Records:
    """Batches or ranks put together, ordered by ``index``."""
    parts = list(parts)
    order = np.argsort(np.concatenate([p.index for p in parts]), kind="stable")
    return Records(*(np.concatenate([getattr(p, f.name) for p in parts])[order] for f in fields(Records)))


def hits(records: Records, k: int, accepted: Sequence[frozenset[int]] | None = None) -> np.ndarray:
    """Whether each image's label is among its k best classes, bool (N,).

    With ``accepted`` (one set per image, ReaL: Beyer et al., arXiv 2006.07159) any member counts.
    """
    if accepted is None:
        among: np.ndarray = (records.top[:, :k] == records.label[:, None]).any(1)
        return among
    return np.array(
        [bool(ok.intersection(row[:k].tolist())) for row, ok in zip(records.top, accepted)], dtype=bool
    )


def top1_top5(records: Records, accepted: Sequence[frozenset[int]] | None = None) -> tuple[float, float]:
    """Accuracies in percent over images that have a label (a non-empty set with ``accepted``)."""
    known = _known(records, accepted)
    if not known.any():
        return float("nan"), float("nan")
    return tuple(100 * float(hits(records, k, accepted)[known].mean()) for k in (1, TOP))  # type: ignore[return-value]


def _known(records: Records, accepted: Sequence[frozenset[int]] | None) -> np.ndarray:
    """Whether each image has a label (a non-empty set with ``accepted``), bool (N,)."""
    return records.label >= 0 if accepted is None else np.array([bool(each) for each in accepted])


def compute(records: Records, accepted: Sequence[frozenset[int]] | None = None) -> dict[str, float]:
    """All metrics: accuracies (percent), cross-entropy (nats), Brier score, calibration errors (percent), number of images.

    With ``accepted`` (see ``hits``) accuracies alone. Raises UserError where no image has a label.
    """
    known = _known(records, accepted)
    if not known.any():
        raise UserError(
            "none of the images has a label: there is nothing to compare predictions with (see dattrain predict)"
        )
    top1, top5 = top1_top5(records, accepted)
    low, high = bootstrap_interval(100.0 * hits(records, 1, accepted)[known])
    accuracies = {"top1": top1, "top1_low": low, "top1_high": high, "top5": top5}
    if accepted is not None:
        return {**accuracies, "images": int(known.sum())}
    bins = calibration(records)
    return {
        **accuracies,
        "loss": float(records.nll[known].mean()),
        "brier": float(records.brier[known].mean()),
        "ece": 100 * bins.ece,
        "max_calibration_error": 100 * bins.mce,
        "images": int(known.sum()),
    }


def per_class(records: Records, num_classes: int) -> list[dict[str, float]]:
    """Per class that has images: images, top-1 and top-5 recall, precision (percent; NaN where never predicted)."""
    first, five = hits(records, 1), hits(records, TOP)
    rows = []
    predicted = np.bincount(records.top[:, 0], minlength=num_classes)
    for label in np.unique(records.label[records.label >= 0]):
        members = records.label == label
        right = int(first[members].sum())
        rows.append(
            {
                "class": int(label),
                "images": int(members.sum()),
                "top1": 100 * right / int(members.sum()),
                "top5": 100 * float(five[members].mean()),
                "precision": 100 * right / predicted[label] if predicted[label] else float("nan"),
            }
        )
    return rows


def confusion(records: Records) -> list[tuple[int, int, int]]:
    """Non-zero cells (label, predicted, images): errors first, the most frequent first; then the diagonal."""
    known = records.label >= 0
    pairs = np.stack([records.label[known], records.top[known, 0]], 1)
    cells, counts = np.unique(pairs, axis=0, return_counts=True)
    rows = [(int(a), int(b), int(n)) for (a, b), n in zip(cells, counts)]
    return sorted(rows, key=lambda row: (row[0] == row[1], -row[2], row[0], row[1]))


BINS = 15
"""Bins of confidence, in a calibration."""


def calibration(records: Records) -> Calibration:
    """Reliability of the best class's probability, over images with a label."""
    known = records.label >= 0
    right, sure = hits(records, 1)[known], records.confidence[known]
    edges = np.linspace(0, 1, BINS + 1)
    place = np.clip(np.ceil(sure * BINS).astype(int) - 1, 0, BINS - 1)
    count = np.bincount(place, minlength=BINS)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(place, sure, BINS) / count
        accuracy = np.bincount(place, right.astype(float), BINS) / count
    gap = np.abs(confidence - accuracy)
    some = count > 0
    ece = float((gap[some] * count[some]).sum() / max(count.sum(), 1))
    return Calibration(
        edges, count, confidence, accuracy, ece, float(gap[some].max()) if some.any() else float("nan")
    )


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the mean of ``values`` over 1,000 draws of images with replacement, in the same unit."""
    generator = np.random.default_rng(0)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(1000)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
