"""What detection draws, and where it puts the pixels of an image."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dattrain.config.data_sections import Augment, Geometry
from dattrain.data.augment.dense_plan import resized_size
from dattrain.data.augment.detection_plan import NOBODY, DetectionPlan, draw, with_partners

COCO = {
    "short_side": 800,
    "short_sides": tuple(range(480, 801, 32)),
    "long_side": 1333,
    "scale": (1.0, 1.0),
    "crop": None,
    "distortion": False,
}


def plan_of(positions=range(4000), *, seed=3, **geometry) -> DetectionPlan:
    return draw(Geometry(**{**COCO, **geometry}), Augment(), seed, np.asarray(positions))


def test_a_draw_is_a_function_of_seed_and_position_alone():
    settings = {"precrop": 0.5, "scale": (0.1, 2.0)}
    whole, positions = plan_of(**settings), [7, 3999, 0]
    some, other = plan_of(positions, **settings), plan_of(seed=4, **settings)
    for f in dataclasses.fields(DetectionPlan):
        if f.name in ("short_side", "precrop", "precrop_short_side", "precrop_draw"):
            values = getattr(whole, f.name)
            np.testing.assert_array_equal(getattr(some, f.name), values[positions])
            assert (values != getattr(other, f.name)).any()
    for i, position in enumerate(positions):
        assert some.placement(i, 480, 640) == whole.placement(position, 480, 640)
        np.testing.assert_array_equal(some.pasted(i, 9), whole.pasted(position, 9))
    table = np.column_stack((whole.short_side, whole.precrop, whole.precrop_short_side, whole.precrop_draw))
    drawn = np.column_stack((table, whole.dense.scale, whole.dense.flip, np.roll(table, 1, axis=0))).T
    assert np.abs(np.corrcoef(drawn.astype(float)) - np.eye(len(drawn))).max() < 0.08  # five sigma of 4,000


def test_short_sides_are_drawn_alike():
    plan = plan_of()
    values, counts = np.unique(plan.short_side, return_counts=True)
    assert values.tolist() == list(COCO["short_sides"])
    assert (np.abs(counts - 4000 / 11) < 100).all()
    for i in range(50):
        size = plan.placement(i, 427, 640).shape
        assert size == resized_size(427, 640, short_side=int(plan.short_side[i]), long_side=1333)
        assert min(size) <= plan.short_side[i] and max(size) <= 1333
    assert set(plan_of(short_sides=()).short_side.tolist()) == {800}


def test_the_first_crop_is_that_of_detr():
    """Its height and width, by the pixels that a shorter side of 400, 500 or 600 gives, are uniform in [384, min(side, 600)]."""
    plan = plan_of(precrop=0.5)
    assert abs(plan.precrop.mean() - 0.5) < 0.04
    sides, places = [], []
    for i in np.flatnonzero(plan.precrop).tolist():
        placed = plan.placement(i, 480, 640)
        height, width = resized_size(480, 640, short_side=int(plan.precrop_short_side[i]), long_side=1333)
        top, left, h, w = placed.box
        assert 0 <= top <= 480 - h and 0 <= left <= 640 - w
        # Stored pixels are whole: half a pixel at either end.
        tall, wide = h * height / 480, w * width / 640
        assert min(384, height) - 2 < tall < min(height, 600) + 2 and 384 - 2 < wide < min(width, 600) + 2
        assert placed.size == resized_size(h, w, short_side=int(plan.short_side[i]), long_side=1333)
        assert placed.shape == placed.size
        if plan.precrop_short_side[i] == 600:
            sides.append((tall, wide))
            places.append((top / max(480 - h, 1), left / max(640 - w, 1)))
    sides, places = np.array(sides), np.array(places)
    assert np.abs(sides.mean(0) - 492).max() < 15 and np.abs(np.corrcoef(sides.T)[0, 1]) < 0.2
    assert np.abs(places.mean(0) - 0.5).max() < 0.05
    small = plan.placement(int(np.flatnonzero(plan.precrop)[0]), 40, 2000)
    assert small.box[0] == 0 and small.box[2] == 40, "a side that has less is taken whole"


def test_large_scale_jitter():
    plan = plan_of(range(300), short_side=1024, short_sides=(), long_side=1024, scale=(0.1, 2.0), crop=1024)
    longer = []
    for i in range(300):
        placed = plan.placement(i, 480, 640)
        longer.append(placed.size[1])
        assert placed.size == resized_size(
            480, 640, short_side=1024, long_side=1024, scale=plan.dense.scale[i]
        )
        assert placed.shape == (min(1024, placed.size[0]), min(1024, placed.size[1]))
    assert 102 <= min(longer) < 130 and 2020 < max(longer) <= 2048


def test_partners_are_others_of_the_update_whoever_asks():
    seen, batch = 48, 16
    slots = np.random.default_rng(0).permutation(np.arange(seen, seen + batch))
    needed, rows = with_partners(slots, 0.7, 5, seen, batch)
    whole = {slot: needed[row] if row != NOBODY else None for slot, row in zip(slots, rows)}
    assert 4 < sum(partner is not None for partner in whole.values()) < 16
    assert all(partner != slot for slot, partner in whole.items())
    assert len(needed) == batch, "all are there already"
    for start in range(0, batch, 2):
        own = slots[start : start + 2]
        needed, rows = with_partners(own, 0.7, 5, seen, batch)
        assert needed[:2].tolist() == own.tolist() and len(set(needed.tolist())) == len(needed)
        for slot, row in zip(own, rows):
            assert whole[slot] == (None if row == NOBODY else needed[row])
    assert (with_partners(slots, 0.0, 5, seen, batch)[1] == NOBODY).all()
    partners = [
        (partner - slot) % 4
        for seen in range(0, 4000, 4)
        for slot, partner in zip(*_resolved(np.arange(seen, seen + 4), seen))
    ]
    assert (np.abs(np.bincount(partners, minlength=4)[1:] - 4000 / 3) < 150).all()


def _resolved(slots: np.ndarray, seen: int) -> tuple[np.ndarray, np.ndarray]:
    needed, rows = with_partners(slots, 1.0, 0, seen, 4)
    return slots, needed[rows]


def test_any_number_of_objects_is_pasted_as_often():
    plan = plan_of(range(2000))
    chosen = [plan.pasted(i, 4) for i in range(2000)]
    assert (np.abs(np.bincount([len(c) for c in chosen], minlength=5) - 400) < 100).all()
    assert (np.abs(np.bincount(np.concatenate(chosen), minlength=4) - 1000) < 110).all()
    assert all(len(set(c.tolist())) == len(c) and (np.diff(c) > 0).all() for c in chosen)
    assert all(len(plan.pasted(i, 0)) == 0 for i in range(20))


@pytest.mark.parametrize("flip", [False, True])
def test_a_placement_moves_boxes_as_it_moves_pixels(flip):
    """Of every pixel that is kept, the box around it lies over the rows and columns whose sources it is."""
    plan = plan_of(
        range(60), precrop=0.5, precrop_short_sides=(40,), precrop_sides=(32, 44), short_sides=(37, 90),
        long_side=120, crop=48,
    )  # fmt: skip
    for i in range(60):
        placed = dataclasses.replace(plan.placement(i, 50, 70), flip=flip)
        for at in (placed, placed.cut(20, 31), placed.cut(500, 30)):
            height, width = at.shape
            assert at is placed or (height <= 500 and width <= 31)
            y, x = at.sources(slice(0, height), slice(0, width))
            box = at.boxes(
                np.array(
                    [[x[w], y[h], x[w] + 1, y[h] + 1] for h, w in ((0, 0), (height - 1, width - 1))], float
                )
            )
            centres = np.array([[0.5, 0.5], [width - 0.5, height - 0.5]])
            assert (box[:, :2] <= centres + 1e-9).all() and (centres <= box[:, 2:] + 1e-9).all()
            left, top, right, bottom = at.boxes(np.array([at.seen]))[0]
            assert (left, top, right, bottom) == pytest.approx((0, 0, width, height), abs=1e-9)
            # A cut is the same picture, but for what is cut off.
            rows, columns = placed.sources(slice(0, height), slice(0, width))
            np.testing.assert_array_equal(rows, y)
            np.testing.assert_array_equal(columns, x)
