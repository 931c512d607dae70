"""How long a recipe trains on CPUs alone, at least; without torch, so that a submission can ask. Pure.

A speed on GPUs is not guessed. On CPUs a bound is enough, since what is refused for it is wrong by years: ImageNet on a profile that
names no GPUs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dattrain.config.derive import derive
from dattrain.config.schema import Config
from dattrain.config.values import as_pair

GFLOPS = {
    "dat_atto": 0.303,
    "dat_tiny": 4.589,
    "dat_small": 9.008,
    "dat_base": 15.788,
    "dat_pp_tiny": 4.288,
    "dat_pp_small": 9.426,
    "dat_pp_base": 16.559,
    "dat_pp_large": 36.847,
}
"""Multiply-adds of an image forward at 224 px, in 10^9, as ``dattrain.models.flops`` counts them."""

CORE = 150e9
"""Operations a second that a core makes at most: DAT-T in bf16 made 116e9 a core (docs/benchmarks/step-cpu.md)."""


@dataclass(frozen=True)
class CpuTime:
    """A bound, and what it rests on."""

    seconds: float
    """At least so many, evaluation left out."""
    images: int
    """Images to be trained on, over all epochs."""
    images_per_s: float
    """At most."""

    @property
    def words(self) -> str:
        """The bound in the unit that suits it."""
        days = self.seconds / 86400
        if days >= 730:
            return f"{days / 365.25:,.0f} years"
        return f"{days:,.0f} days" if days >= 2 else f"{self.seconds / 3600:,.1f} hours"


def bound(config: Config, *, samples: int, tasks: int, cores: int) -> CpuTime | None:
    """Time of ``tasks`` CPU tasks of ``cores`` each; None for a network that is not ours.

    Args:
        samples: training images of an epoch.

    Raises:
        ConfigError: as ``config.derive.derive``.
    """
    if config.model.name not in GFLOPS:
        return None
    forward = GFLOPS[config.model.name] * 1e9 * _pixels(config) / 224**2
    # A multiply-add is two operations, and backward costs twice the forward.
    rate = tasks * cores * CORE / (6 * forward)
    steps = derive(config, world=tasks, samples_per_epoch=samples).last_step
    images = math.ceil(steps * config.train.global_batch)
    return CpuTime(images / rate, images, rate)


def _pixels(config: Config) -> float:
    """Of an image, at least. What a decoder does, and that attention grows with the square, only makes the time longer."""
    g = config.geometry
    if config.task.kind == "classification":
        size = as_pair(config.model.img_size)
    elif g.crop is not None:
        size = as_pair(g.crop)
    else:
        # A square, the smallest of an image's sizes, times the mean square of scales drawn uniformly.
        low, high = g.scale
        return min(g.short_side, g.long_side) ** 2 * (low * low + low * high + high * high) / 3
    return size[0] * size[1]
