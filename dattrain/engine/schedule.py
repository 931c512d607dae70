"""Learning rate by update: pure functions of the update's number, so a resume needs nothing but it."""

from __future__ import annotations

import math

from dattrain.config.derive import Derived
from dattrain.config.sections import Schedule


def rate(schedule: Schedule, derived: Derived, update: int) -> float:
    """Learning rate of the 0-based ``update``.

    During the first ``warmup_steps`` it grows linearly from ``warmup_lr`` towards ``peak_lr``. ``cosine`` then follows the
    half period over all of ``total_steps``, warm-up included (timm's CosineLRScheduler with ``warmup_prefix=False``, one
    cycle, which the authors and Swin use); ``linear`` falls from the end of the warm-up to ``min_lr`` at ``total_steps``
    (Swin's linear schedule); ``constant`` stays. ``poly`` and ``step`` are mmcv's: ``min_lr`` and a share of what is above it,
    (1 - update / total_steps) ** ``power``, or ``gamma`` for each of ``milestones`` that is reached. The warm-up multiplies
    that by a factor that grows linearly from ``warmup_lr / peak_lr`` to 1.
    """
    d, kind = derived, schedule.kind
    if kind in ("poly", "step"):
        left: float
        if kind == "poly":
            left = max(0.0, 1 - update / d.total_steps) ** schedule.power
        else:
            left = schedule.gamma ** sum(update >= each for each in d.milestones)
        decayed = d.min_lr + (d.peak_lr - d.min_lr) * left
        if update >= d.warmup_steps:
            return decayed
        return decayed * (1 - (1 - update / d.warmup_steps) * (1 - d.warmup_lr / d.peak_lr))
    if update < d.warmup_steps:
        return d.warmup_lr + update * ((d.peak_lr - d.warmup_lr) / d.warmup_steps)
    if kind == "constant":
        return d.peak_lr
    if update >= d.total_steps:
        return d.min_lr
    if kind == "linear":
        done = (update - d.warmup_steps) / (d.total_steps - d.warmup_steps)
        return d.peak_lr - (d.peak_lr - d.min_lr) * done
    return d.min_lr + 0.5 * (d.peak_lr - d.min_lr) * (1 + math.cos(math.pi * update / d.total_steps))
