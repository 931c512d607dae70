"""How many cores it takes to decode and augment as fast as devices train. Pure; rests on a rate that was measured on one processor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SECONDS_PER_IMAGE, SECONDS_PER_PIXEL = 0.94e-3, 2.0e-9
"""CPU time of an image from shard to batch, and of each pixel of its crop: a core of an AMD EPYC, JPEGs of 466 x 409 and 74 KB
(docs/benchmarks/images-per-node.md)."""
RANDAUGMENT_PER_IMAGE, RANDAUGMENT_PER_PIXEL = 0.22e-3, 11.0e-9
"""What RandAugment adds."""


@dataclass(frozen=True)
class Decoding:
    """What a rate takes.

    Attributes:
        images_per_s_of_core: what a core makes.
        cores_per_node: that decode, beside those that the ranks themselves keep busy.
        workers: of each rank, ``data.workers``.
    """

    images_per_s_of_core: float
    cores_per_node: float
    workers: int


def images_per_core(img_size: Sequence[int], *, randaugment: bool) -> float:
    """Images that a core decodes and augments in a second to crops of ``img_size`` (height, width)."""
    pixels = math.prod(img_size)
    seconds = SECONDS_PER_IMAGE + SECONDS_PER_PIXEL * pixels
    if randaugment:
        seconds += RANDAUGMENT_PER_IMAGE + RANDAUGMENT_PER_PIXEL * pixels
    return 1 / seconds


def decoding(
    images_per_s: float, img_size: Sequence[int], *, nodes: int, world: int, randaugment: bool
) -> Decoding:
    """Cores and workers for ``images_per_s`` of ``world`` ranks on ``nodes``; cores are taken to add up, hardware threads of one are not two."""
    rate = images_per_core(img_size, randaugment=randaugment)
    return Decoding(rate, images_per_s / rate / nodes, math.ceil(images_per_s / rate / world))
