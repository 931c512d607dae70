"""Lying and standing images apart: every slot once, one mixed micro-batch at most, and how much of it is padding."""

from __future__ import annotations

import numpy as np
import pytest

from dattrain.config.data_sections import Augment, Geometry
from dattrain.data.aspect_groups import grouped, padded_shares
from dattrain.data.augment.detection_plan import draw

COCO = {
    (480, 640): 30, (427, 640): 16, (426, 640): 9, (375, 500): 6, (360, 640): 4, (333, 500): 5, (512, 640): 5,
    (640, 480): 11, (640, 427): 6, (640, 426): 2, (500, 375): 3, (612, 612): 3,
}  # fmt: skip
"""Sizes (height, width) as COCO's photographs have them, three of four lying, and how many of a hundred."""


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 8])
def test_every_slot_comes_once_and_one_micro_batch_is_mixed_at_most(micro_batch):
    random = np.random.default_rng(0)
    for share in (0.0, 0.1, 0.3, 0.5, 1.0):
        standing = random.random(16) < share
        order = grouped(standing, micro_batch)
        assert sorted(order.tolist()) == list(range(16))
        batches = standing[order].reshape(-1, micro_batch)
        mixed = batches.any(1) & ~batches.all(1)
        assert mixed.sum() == (standing.sum() % micro_batch != 0)
        # Whoever waits for its like waits no longer than it must: kinds keep their own order.
        for kind in (False, True):
            assert (np.diff(order[standing[order] == kind]) > 0).all()


def test_slots_stay_near_their_places():
    """A rank reads the shards of its own slots, and is told beforehand which these are."""
    standing = np.random.default_rng(1).random(256) < 0.25
    moved = np.abs(grouped(standing, 2) - np.arange(256))
    assert moved.max() < 32 and moved.mean() < 4


def test_padding_by_hand():
    # One update of four images at pad_to 10: lying 10 x 20, standing 20 x 10, in turn.
    sizes = np.array([[10, 20], [20, 10], [10, 20], [20, 10]])
    assert padded_shares([sizes], 2, 10) == (0.0, 0.5)
    assert padded_shares([np.array([[9, 20], [10, 18]])], 2, 10) == pytest.approx((0.1, 0.1))


@pytest.mark.parametrize(
    "geometry, apart, mixed",
    [
        ({}, 0.08, 0.16),
        ({"short_sides": range(480, 801, 32)}, 0.18, 0.22),
        ({"short_sides": range(480, 801, 32), "precrop": 0.5}, 0.19, 0.22),
    ],
)
def test_less_of_coco_is_padding(geometry, apart, mixed):
    """Micro-batches of 2 in updates of 16: what docs/dense.md says."""
    sides = Geometry(short_side=800, long_side=1333, scale=(1.0, 1.0), crop=None, **geometry)
    kinds, weights = np.array(list(COCO)), np.array(list(COCO.values()), dtype=float)
    sizes = kinds[np.random.default_rng(0).choice(len(kinds), 4096, p=weights / weights.sum())]
    plan = draw(sides, Augment(), 0, np.arange(len(sizes)))
    shapes = np.array([plan.placement(i, *size).shape for i, size in enumerate(sizes.tolist())])
    found = padded_shares(np.split(shapes, len(shapes) // 16), 2, 32)
    print(f"padding: {found[0]:.3f} with geometry.group_aspect, {found[1]:.3f} without")
    assert found == pytest.approx((apart, mixed), abs=0.015)
