from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dattrain.config.data_sections import Augment, Geometry
from dattrain.data.augment.dense_plan import DensePlan, draw, resized_size

MANY = draw(Geometry(), Augment(interpolation="bilinear"), 3, np.arange(20_000))


def arrays(plan: DensePlan) -> dict[str, np.ndarray]:
    return {
        f.name: value
        for f in dataclasses.fields(plan)
        if isinstance(value := getattr(plan, f.name), np.ndarray)
    }


def test_a_draw_is_a_function_of_seed_and_position_alone():
    positions = np.array([7, 2**40 + 3, 0, 19_999])
    whole = arrays(MANY)
    for name, values in arrays(draw(Geometry(), Augment(interpolation="bilinear"), 3, positions)).items():
        for i in (0, 2, 3):
            np.testing.assert_array_equal(values[i], whole[name][positions[i]], err_msg=name)
    other = arrays(draw(Geometry(), Augment(), 4, np.arange(100)))
    assert all((values != whole[name][:100]).any() for name, values in other.items())


def test_no_draw_depends_on_another():
    """Fields of one sample, and of neighbours, are uncorrelated."""
    columns = {
        "scale": MANY.scale,
        **{f"place{i}{j}": MANY.place[:, i, j] for i in (0, 1, 9) for j in (0, 1)},
        "flip": MANY.flip,
        "contrast_first": MANY.contrast_first,
    }
    for name, neutral in (("brightness", 0), ("contrast", 1), ("saturation", 1), ("hue", 0)):
        values = getattr(MANY, name)
        columns[f"{name} on"], columns[name] = values != neutral, values
    table = np.array([*columns.values(), *(np.roll(v, 1) for v in columns.values())], dtype=np.float64)
    correlation = np.corrcoef(table) - np.eye(len(table))
    assert np.abs(correlation).max() < 0.035  # five sigma of 20,000


def test_ranges_and_odds_are_the_stated_ones():
    assert 0.5 < MANY.scale.min() < 0.501 and 1.999 < MANY.scale.max() < 2
    assert abs(MANY.scale.mean() - 1.25) < 0.01
    for values, neutral, low, high in (
        (MANY.brightness, 0, -32, 32),
        (MANY.contrast, 1, 0.5, 1.5),
        (MANY.saturation, 1, 0.5, 1.5),
        (MANY.hue, 0, -36, 36),
    ):
        drawn = values[values != neutral]
        assert abs(len(drawn) / len(values) - 0.5) < 0.02
        span = high - low
        assert low <= drawn.min() < low + 0.002 * span and high - 0.002 * span < drawn.max() <= high
        counts, _ = np.histogram(drawn, bins=10, range=(low, high))
        assert np.abs(counts / len(drawn) - 0.1).max() < 0.02
    for chance in (MANY.flip, MANY.contrast_first):
        assert abs(chance.mean() - 0.5) < 0.02
    assert MANY.place.shape == (20_000, 10, 2) and MANY.place.min() > 0 and MANY.place.max() < 1
    assert MANY.crop == (512, 512)


def test_what_is_switched_off_is_not_drawn():
    geometry = Geometry(scale=(1.0, 1.0), distortion=False, crop=None)
    plan = draw(geometry, Augment(hflip=0.0), 3, np.arange(50))
    assert plan.crop is None and (plan.scale == 1).all() and not plan.flip.any()
    assert not plan.brightness.any() and not plan.hue.any()
    assert (plan.contrast == 1).all() and (plan.saturation == 1).all()


@pytest.mark.parametrize(
    ("size", "scale", "want"),
    [
        # ADE20K's most common size and mmcv's imrescale((2048, 512)) of it, then of (1024, 256) and (4096, 1024).
        ((512, 683), 1.0, (512, 683)),
        ((512, 683), 0.5, (256, 342)),
        ((512, 683), 2.0, (1024, 1366)),
        ((683, 512), 0.75, (512, 384)),
        # The long side decides from a ratio of 4 on.
        ((100, 1000), 1.0, (205, 2048)),
        ((1000, 100), 1.0, (2048, 205)),
        ((300, 400), 1.0, (512, 683)),
        # 2048 * .7003 is 1434.2, of which mmseg keeps 1434, and 358 of 358.55.
        ((512, 512), 0.7003, (358, 358)),
        ((1, 10_000), 1.0, (1, 2048)),
    ],
)
def test_sizes_are_those_of_mmcv(size, scale, want):
    assert resized_size(*size, short_side=512, long_side=2048, scale=scale) == want


@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(0.25, 2.5))
def test_a_resized_image_keeps_ratio_and_limits(height, width, scale):
    new = resized_size(height, width, short_side=512, long_side=2048, scale=scale)
    assert max(new) <= 2048 * scale + 0.5 and min(new) <= 512 * scale + 0.5
    assert new == resized_size(width, height, short_side=512, long_side=2048, scale=scale)[::-1]
    if min(new) > 1:
        factor = min(int(2048 * scale) / max(height, width), int(512 * scale) / min(height, width))
        assert abs(new[0] - height * factor) <= 0.5 + 1e-6 and abs(new[1] - width * factor) <= 0.5 + 1e-6
