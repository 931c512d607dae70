from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.data.mixup import cutmix_bbox_and_lam
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import functional as tvf

from dattrain.config.data_sections import Augment
from dattrain.data.augment.plan import crop_box, draw, eval_geometry, fill_color, mates

SIZE = (224, 192)


@given(
    st.integers(1, 700),
    st.integers(1, 700),
    st.integers(0, 10**6),
    st.sampled_from([(0.08, 1.0), (0.9, 1.0)]),
)
def test_crop_is_timms(height, width, position, scale):
    """timm's loop over attempts, fed with our draws, takes the box that we take."""
    config = Augment(crop_scale=scale)
    attempts = draw(config, 3, [position], SIZE).crop[0]
    box = crop_box(attempts, height, width, config.crop_ratio)
    expected = None
    for area, aspect, u, v in attempts:
        w = round(math.sqrt(area * height * width * aspect))
        h = round(math.sqrt(area * height * width / aspect))
        if 0 < w <= width and 0 < h <= height:
            expected = int(u * (height - h + 1)), int(v * (width - w + 1)), h, w
            break
    if expected is None:  # timm's own fallback
        params = RandomResizedCropAndInterpolation.get_params
        image = torch.empty(3, height, width)
        top, left, h, w = params(image, (2.0, 2.0), config.crop_ratio)
        if min(h, w) < 1 or h > height or w > width:
            return  # timm's fallback leaves the image where a side is a few pixels; ours does not
        expected = top, left, h, w
    assert box == expected
    top, left, h, w = box
    assert 0 <= top <= height - h and 0 <= left <= width - w and h > 0 and w > 0


def test_crops_are_distributed_as_timms():
    random.seed(0)
    image = torch.empty(3, 375, 500)
    theirs = np.array(
        [
            RandomResizedCropAndInterpolation.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
            for _ in range(4000)
        ]
    )
    plan = draw(Augment(), 0, np.arange(4000), SIZE)
    ours = np.array([crop_box(a, 375, 500, plan.crop_ratio) for a in plan.crop])
    for column in range(4):
        assert kolmogorov_smirnov(theirs[:, column], ours[:, column]) < 0.045


def test_a_sample_is_drawn_alike_in_any_company():
    """Alone, in another batch, beside other samples: what is drawn for a position is the same."""
    config = Augment(color_jitter=0.4)
    at = np.array([10**10, 10**10 + 1, 4, 5, 2**33, 2**33 + 1])
    whole = draw(config, 7, at, SIZE)
    for i in range(0, 6, 2):
        part = draw(config, 7, at[i : i + 2], SIZE)
        for field in dataclasses.fields(part):
            ours, all_ = getattr(part, field.name), getattr(whole, field.name)
            if isinstance(ours, np.ndarray):
                shift = i if field.name == "mix_partner" else 0
                np.testing.assert_array_equal(
                    ours + shift if shift else ours, all_[i : i + 2], err_msg=field.name
                )
    other = draw(config, 8, at, SIZE)
    assert not np.array_equal(other.crop, whole.crop) and not np.array_equal(other.mix, whole.mix)


def test_settings_that_are_off_draw_nothing():
    config = Augment(hflip=0, randaugment=None, color_jitter=0, erase_prob=0, mixup=0, cutmix=0)
    plan = draw(config, 0, np.arange(500), SIZE)
    assert not plan.flip.any() and plan.ops.shape == (500, 0) and (plan.jitter == 1).all()
    assert not plan.erase.any() and (plan.mix == 1).all() and not plan.mix_box.any()
    assert draw(Augment(hflip=1, erase_prob=1), 0, np.arange(500), SIZE).flip.all()
    assert (draw(Augment(mix_prob=0.0), 0, np.arange(500), SIZE).mix == 1).all()


def test_erasing_is_distributed_as_timms(monkeypatch):
    boxes: list[tuple[int, int, int, int]] = []
    eraser = RandomErasing(probability=1.0, mode="const", device="cpu")
    random.seed(0)
    for _ in range(1500):
        image = torch.ones(1, *SIZE)
        eraser(image)
        rows, columns = torch.nonzero(image[0].eq(0).any(1)), torch.nonzero(image[0].eq(0).any(0))
        boxes.append((int(rows[0]), int(columns[0]), len(rows), len(columns)))
    theirs = np.array(boxes)
    plan = draw(Augment(erase_prob=1.0), 0, np.arange(6000), SIZE)
    assert (plan.erase[:, 2] > 0).all()
    for column in range(4):
        assert kolmogorov_smirnov(theirs[:, column], plan.erase[:, column]) < 0.05
    top, left, h, w = plan.erase.T
    assert (
        (top >= 0).all() and (left >= 0).all() and (top + h <= SIZE[0]).all() and (left + w <= SIZE[1]).all()
    )
    assert abs((draw(Augment(), 0, np.arange(8000), SIZE).erase[:, 2] > 0).mean() - 0.25) < 0.02
    assert plan.erase_key.min() >= 0 and plan.erase_key.max() < 2**32


@pytest.mark.parametrize("alpha", [0.1, 0.8, 1.0, 4.0])
def test_mixup_weights_follow_the_beta_distribution(alpha):
    plan = draw(Augment(mixup=alpha, cutmix=0), 0, np.arange(16_000), SIZE)
    assert not plan.mix_box.any() and (plan.mix[::2] == plan.mix[1::2]).all()
    theirs = np.random.default_rng(0).beta(alpha, alpha, 8000).astype(np.float32)
    assert kolmogorov_smirnov(theirs, plan.mix[::2]) < 0.03
    assert abs(plan.mix.std() - math.sqrt(1 / (4 * (2 * alpha + 1)))) < 0.01


def test_cutmix_boxes_and_weights_are_timms():
    plan = draw(Augment(mixup=0, cutmix=1.0), 0, np.arange(16_000), SIZE)
    np.testing.assert_allclose(plan.mix, 1 - plan.mix_box[:, 2] * plan.mix_box[:, 3] / (224 * 192), atol=1e-6)
    np.random.seed(0)
    theirs = []
    for lam in np.random.beta(1.0, 1.0, 8000):
        (yl, yh, xl, xh), lam = cutmix_bbox_and_lam((3, *SIZE), lam)
        theirs.append((yl, xl, yh - yl, xh - xl, lam) if (yh - yl) * (xh - xl) else (0, 0, 0, 0, lam))
    table = np.array(theirs)
    ours = np.column_stack((plan.mix_box, plan.mix))[::2]
    for column in range(5):
        assert kolmogorov_smirnov(table[:, column], ours[:, column]) < 0.03
    both = draw(Augment(), 0, np.arange(16_000), SIZE)
    assert abs((both.mix_box[:, 2] > 0).mean() - 0.5 * (plan.mix_box[:, 2] > 0).mean()) < 0.02


def test_bad_samples_are_not_mixed():
    for group, whole in ((2, [0, 1, 4, 5]), (8, [0, 2, 5, 7])):
        plan = draw(Augment(mix_group=group), 0, np.arange(8), SIZE)
        bad = np.array([0, 0, 0, 1, 0, 0, 1, 0], dtype=bool)
        unmixed = plan.without_mixing(bad)
        rest = sorted({*range(8)} - {*whole})
        assert (unmixed.mix[rest] == 1).all() and not unmixed.mix_box[rest].any()
        assert (unmixed.mix[whole] == plan.mix[whole]).all()
        assert plan.without_mixing(np.zeros(8, dtype=bool)) is plan


@pytest.mark.parametrize("group", [1, 2, 6, 8])
def test_whoever_trains_on_a_group_draws_the_same(group):
    """Slots in any cut, the last group shorter where it does not divide: partners and keys are those of the whole."""
    slots = np.random.default_rng(0).permutation(22)
    _, whole = mates(slots, 0, 22, group)
    assert (slots[whole.partner][whole.partner] == slots).all(), "each is its partner's partner"
    for step in (1, 3, 11):
        for start in range(0, 22, step):
            stop = min(start + step, 22)
            positions, part = mates(slots, start, stop, group)
            assert (positions[: stop - start] == slots[start:stop]).all()
            assert len(set(positions.tolist())) == len(positions) <= 2 * step, "none is decoded twice"
            assert (positions[part.partner] == slots[whole.partner[start:stop]]).all()
            assert (part.key == whole.key[start:stop]).all()


def test_one_that_is_left_over_is_not_mixed():
    plan = draw(Augment(), 0, np.arange(7), SIZE)
    assert plan.mix[6] == 1 and not plan.mix_box[6].any() and (plan.mix[:6] < 1).any()


def test_color_jitter():
    plan = draw(Augment(color_jitter=0.4), 0, np.arange(6000), SIZE)
    assert 0.6 <= plan.jitter.min() < 0.61 and 1.39 < plan.jitter.max() <= 1.4
    assert len({tuple(order) for order in plan.jitter_order.tolist()}) == 6


def test_fill_is_timms_mean_color():
    assert fill_color(Augment()) == (124, 116, 104)


@given(
    st.integers(20, 900),
    st.integers(20, 900),
    st.sampled_from([(224, 0.875), (384, 1.0), (64, 0.9), (96, 0.95)]),
)
def test_evaluation_geometry_is_torchvisions(height, width, case):
    """torchvision's resize and central crop of an image whose pixels hold their own coordinates."""
    side, crop_pct = case
    (new_h, new_w), (top, left) = eval_geometry(
        height, width, (side, side), resize="shorter", crop_pct=crop_pct
    )
    short = math.floor(side / crop_pct)
    assert [new_h, new_w] == tvf._compute_resized_output_size((height, width), [short])
    grid = torch.stack(torch.meshgrid(torch.arange(new_h), torch.arange(new_w), indexing="ij"))
    crop = tvf.center_crop(grid, [side, side])
    assert crop.shape[1:] == (side, side) and (top, left) == (int(crop[0, 0, 0]), int(crop[1, 0, 0]))


def test_evaluation_geometry_of_the_authors_and_of_oblong_inputs():
    assert eval_geometry(375, 500, (224, 224), resize="squash", crop_pct=0.875) == ((256, 256), (16, 16))
    (h, w), (top, left) = eval_geometry(100, 1000, (64, 96), resize="shorter", crop_pct=1.0)
    assert (h, top) == (64, 0) and w == 640 and left == (640 - 96) // 2
    (h, w), _ = eval_geometry(1000, 100, (64, 96), resize="shorter", crop_pct=1.0)
    assert w == 96 and h == 960


def kolmogorov_smirnov(a, b) -> float:
    """Largest distance of two empirical distribution functions."""
    both = np.sort(np.concatenate((a, b)))
    fa = np.searchsorted(np.sort(a), both, side="right") / len(a)
    fb = np.searchsorted(np.sort(b), both, side="right") / len(b)
    return float(np.abs(fa - fb).max())
