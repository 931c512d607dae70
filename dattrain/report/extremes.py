"""The worst and the best images of an evaluation, each shown once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def extremes(predictions: Mapping[str, Any]) -> dict[str, Sequence[Mapping[str, Any]]]:
    """``worst`` and ``best`` of predictions, the lowest and the highest first.

    Where there are so few images that some are among both, all are there: the lower half are the worst, the others the best.
    """
    worst, best = (predictions.get(kind, []) for kind in ("worst", "best"))
    low = {each["position"] for each in worst}
    rising = [*worst, *(each for each in reversed(best) if each["position"] not in low)]
    if len(rising) == len(worst) + len(best):
        return {"worst": worst, "best": best}
    half = -(-len(rising) // 2)
    return {"worst": rising[:half], "best": rising[half:][::-1]}
