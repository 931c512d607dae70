"""Which candidates of an image are trained on: a random choice that is a function of a number drawn for the image.

mmdet's ``RandomSampler``, with a hash of a counter (Salmon et al., SC 2011) in place of torch's generator. An image's choice thus
depends neither on the rest of its batch nor on rank, and is the same on every device.
"""

from __future__ import annotations

from torch import Tensor

_MASK = (1 << 32) - 1


def key_of(noise: Tensor) -> Tensor:
    """The 24 bits of an fp32 uniform in [0, 1), as int64 of the same shape."""
    return (noise.double() * (1 << 24)).long()


def hashes(indices: Tensor, key: Tensor) -> Tensor:
    """N int64 below 2^32: random numbers that differ between any two indices.

    Args:
        indices: N int64 in [0, 2^32).
        key: int64 scalar in [0, 2^32).
    """
    return _mix(_mix(indices ^ _mix(key)) ^ _mix(key ^ _MASK))


def choose(candidates: Tensor, count: int, key: Tensor) -> Tensor:
    """The ``count`` candidates of the smallest hashes, or all where there are no more than that; in their own order.

    Args:
        candidates: N int64, increasing.
        key: int64 scalar, see ``key_of``.
    """
    if len(candidates) <= count:
        return candidates
    places = hashes(candidates, key).topk(count, largest=False, sorted=False).indices
    return candidates[places.sort().values]


def sample(matched: Tensor, key: Tensor, *, total: int, positive_share: float) -> tuple[Tensor, Tensor]:
    """At most ``total`` candidates, of which at most ``positive_share`` are positive; negatives fill what positives leave.

    Args:
        matched: N int64 as ``matching.match`` gives them: a box's index is positive, -1 negative, -2 neither.
        key: int64 scalar, see ``key_of``.

    Returns:
        Indices of the positives and of the negatives, int64, increasing.
    """
    positive = choose((matched >= 0).nonzero()[:, 0], int(total * positive_share), key)
    negative = choose((matched == -1).nonzero()[:, 0], total - len(positive), key)
    return positive, negative


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32 bits whose outputs look random.

    Its multipliers, found by C. Wellons' hash-prospector, are below 2^31, so that no product leaves the 63 bits of an int64.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)
