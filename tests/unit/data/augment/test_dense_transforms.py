from __future__ import annotations

import colorsys
import dataclasses

import numpy as np
import pytest
import torch
from host_waits import fake_cuda
from PIL import Image
from small_scenes import COLOURS, scene

from dattrain.config.data_sections import Augment, Geometry
from dattrain.data.annotations.semantic import VOID
from dattrain.data.augment.dense_plan import DensePlan, draw
from dattrain.data.augment.dense_transforms import (
    choose_crop,
    distort,
    nearest,
    normalised,
    resize,
    resize_floats,
    train_sample,
)
from dattrain.data.augment.mixup import Normalize
from dattrain.data.dense_batch import SegmentationBatch

AUGMENT = Augment(interpolation="bilinear")


def plan_of(count: int = 1, **geometry) -> DensePlan:
    """Draws of the first positions, without distortion unless it is asked for."""
    return draw(Geometry(**{"distortion": False, **geometry}), AUGMENT, 0, np.arange(count))


def pair(numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """An image in the colours of a map, and the map."""
    return torch.from_numpy(COLOURS[numbers]).permute(2, 0, 1), torch.from_numpy(numbers)


def test_image_and_map_stay_aligned():
    """Without a change of size a pixel's colour says its class, wherever crop and flip put it."""
    numbers = scene(np.random.default_rng(0), 60, 80)
    plan = plan_of(40, short_side=60, long_side=80, scale=(1.0, 1.0), crop=(24, 40))
    flipped = []
    for i in range(40):
        image, classes = train_sample(*pair(numbers), plan, i)
        assert classes.shape == (24, 40) and image.dtype == classes.dtype == torch.uint8
        np.testing.assert_array_equal(image.permute(1, 2, 0), COLOURS[classes])
        flipped.append(bool(plan.flip[i]))
        # The crop is a part of the map, mirrored where the plan says so.
        own = classes.flip(1) if plan.flip[i] else classes
        places = np.lib.stride_tricks.sliding_window_view(numbers, (24, 40))
        assert (places == own.numpy()).all((2, 3)).any()
    assert {True, False} == set(flipped)


@pytest.mark.parametrize(("scale", "size"), [(0.5, (32, 48)), (1.7, (108, 162))])
def test_a_resized_map_lies_under_its_resized_image(scale, size):
    """Two halves, black and white: the edge is at the same place in both, to half a pixel."""
    numbers = np.zeros((64, 96), np.uint8)
    numbers[:, 41:] = 1
    image = torch.from_numpy(np.repeat(numbers[None] * np.uint8(255), 3, axis=0))
    plan = plan_of(short_side=64, long_side=96, scale=(scale, scale), crop=None)
    image, classes = train_sample(image, torch.from_numpy(numbers), plan, 0)
    assert tuple(classes.shape) == tuple(image.shape[1:]) == size
    edge = classes.float().sum(1)
    light = image[0].float().sum(1) / 255
    assert (edge - light).abs().max() <= 0.5


@pytest.mark.parametrize("size", [(13, 29), (64, 33), (100, 200), (38, 90)])
def test_nearest_is_pillows(size):
    numbers = np.random.default_rng(1).integers(0, 200, (50, 70)).astype(np.uint8)
    want = np.asarray(Image.fromarray(numbers).resize(size[::-1], Image.Resampling.NEAREST))
    got = nearest(torch.from_numpy(numbers), size)
    np.testing.assert_array_equal(got, want)
    box = (slice(3, 11), slice(7, 20))
    np.testing.assert_array_equal(nearest(torch.from_numpy(numbers), size, box), want[box])


@pytest.mark.parametrize("size", [(70, 40), (20, 90)])
def test_resize_is_pillows_to_a_level(photo, size):
    image = photo.crop((100, 100, 163, 150))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    want = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR)).astype(int)
    for got in (resize(pixels, size, "bilinear"), resize_floats(pixels[None], size, "bilinear")[0]):
        assert np.abs(got.permute(1, 2, 0).numpy().astype(int) - want).max() <= 1


def _first_allowed(numbers: np.ndarray, plan: DensePlan, sample: int, share: float) -> np.ndarray:
    """The 75 % rule, read plainly."""
    height, width = plan.crop
    for u, v in plan.place[sample]:
        top = int(u * (max(numbers.shape[0] - height, 0) + 1))
        left = int(v * (max(numbers.shape[1] - width, 0) + 1))
        crop = numbers[top : top + height, left : left + width]
        labelled = crop[crop != VOID].tolist()
        if labelled and all(labelled.count(k) <= share * len(labelled) for k in set(labelled)):
            return crop
    return crop


@pytest.mark.parametrize("share", [0.4, 0.75])
def test_the_rule_of_crops_by_brute_force(share):
    rng = np.random.default_rng(2)
    plan = plan_of(60, short_side=40, long_side=60, scale=(1.0, 1.0), crop=(12, 10), max_class_share=share)
    attempts = set()
    for i in range(60):
        numbers = scene(rng, 40, 60, classes=4)
        numbers[numbers == 0] = VOID
        box, crop = choose_crop(torch.from_numpy(numbers), (40, 60), plan, i)
        np.testing.assert_array_equal(crop, _first_allowed(numbers, plan, i, share))
        np.testing.assert_array_equal(crop, numbers[box])
        first = plan.place[i, 0] * (29, 51)
        attempts.add((box[0].start, box[1].start) == tuple(first.astype(int)))
    assert attempts == {True, False}  # the rule took effect, and not always


def test_a_share_of_one_takes_the_first_place():
    numbers = torch.zeros((40, 60), dtype=torch.uint8)
    plan = plan_of(5, crop=(12, 10), max_class_share=1.0)
    for i in range(5):
        box, _ = choose_crop(numbers, (40, 60), plan, i)
        assert (box[0].start, box[1].start) == tuple((plan.place[i, 0] * (29, 51)).astype(int))


def test_every_place_of_a_crop_comes_and_none_beyond():
    plan = plan_of(600, crop=(3, 2), max_class_share=1.0)
    boxes = [choose_crop(torch.zeros((5, 4), dtype=torch.uint8), (5, 4), plan, i)[0] for i in range(600)]
    assert {(rows.start, columns.start) for rows, columns in boxes} == {
        (y, x) for y in range(3) for x in range(3)
    }
    assert all(rows.stop - rows.start == 3 and columns.stop - columns.start == 2 for rows, columns in boxes)


def test_a_crop_larger_than_the_image_is_the_image():
    numbers = scene(np.random.default_rng(3), 20, 90)
    plan = plan_of(short_side=20, long_side=90, scale=(1.0, 1.0), crop=32)
    image, classes = train_sample(*pair(numbers), plan, 0)
    assert classes.shape == (20, 32) and image.shape == (3, 20, 32)


def test_a_map_without_labels_gives_its_last_crop():
    void = torch.full((40, 60), VOID, dtype=torch.uint8)
    plan = plan_of(crop=(12, 10))
    box, crop = choose_crop(void, (40, 60), plan, 0)
    assert (crop == VOID).all() and (box[0].start, box[1].start) == tuple(
        (plan.place[0, 9] * (29, 51)).astype(int)
    )


def _mmseg(image: np.ndarray, plan: DensePlan, i: int, *, eight_bits: bool) -> np.ndarray:
    """mmseg's PhotoMetricDistortion, pixel by pixel; H x W x 3. ``eight_bits``: cut after every step, hue in steps of 2 degrees."""

    def cut(values):
        values = np.clip(values, 0, 255)
        return np.floor(values) if eight_bits else values

    def by_hsv(pixels, change):
        out = np.empty_like(pixels)
        for place in np.ndindex(pixels.shape[:2]):
            h, s, v = colorsys.rgb_to_hsv(*(pixels[place] / 255).tolist())
            if eight_bits:
                h, s = round(h * 180) / 180, round(s * 255) / 255
            h, s = change(h, s)
            if eight_bits:
                s = np.floor(s * 255) / 255
            out[place] = colorsys.hsv_to_rgb(h % 1, s, v)
        return np.round(out * 255) if eight_bits else out * 255

    pixels = image.astype(np.float64)
    if plan.brightness[i]:
        pixels = cut(pixels + plan.brightness[i])
    if plan.contrast_first[i] and plan.contrast[i] != 1:
        pixels = cut(pixels * plan.contrast[i])
    if plan.saturation[i] != 1:
        pixels = by_hsv(pixels, lambda h, s: (h, min(s * float(plan.saturation[i]), 1)))
    if plan.hue[i]:
        turn = float(plan.hue[i]) / 360
        if eight_bits:
            turn = round(turn * 180) / 180
        pixels = by_hsv(pixels, lambda h, s: (h + turn, s))
    if not plan.contrast_first[i] and plan.contrast[i] != 1:
        pixels = cut(pixels * plan.contrast[i])
    return pixels


def test_distortion_is_mmsegs():
    """Of every combination of steps. Beside mmseg's arithmetic of 8 bits ours differs by its rounding alone."""
    rng = np.random.default_rng(4)
    image = rng.integers(0, 256, (12, 16, 3)).astype(np.uint8)
    image[0, :6] = [(0, 0, 0), (255, 255, 255), (90, 90, 90), (255, 0, 0), (10, 10, 200), (1, 0, 0)]
    plan = plan_of(80, distortion=True)
    seen, off = set(), []
    for i in range(80):
        steps = (plan.brightness[i] != 0, plan.contrast[i] != 1, plan.saturation[i] != 1, plan.hue[i] != 0)
        seen.add((*map(bool, steps), bool(plan.contrast_first[i])))
        got = distort(torch.from_numpy(image).permute(2, 0, 1), plan, i).permute(1, 2, 0).numpy()
        assert np.abs(got - _mmseg(image, plan, i, eight_bits=False)).max() <= 0.501
        off.append(np.abs(got - _mmseg(image, plan, i, eight_bits=True)))
        if not any(steps):
            np.testing.assert_array_equal(got, image)
    assert len(seen) > 28  # of 32
    assert np.mean(off) < 1 and np.max(off) < 9


def test_the_image_that_comes_in_is_left_alone():
    image, classes = pair(scene(np.random.default_rng(5), 40, 40))
    before = image.clone(), classes.clone()
    plan = plan_of(8, short_side=40, long_side=40, scale=(1.0, 1.0), crop=None, distortion=True)
    for i in range(8):
        train_sample(image, classes, plan, i)
    assert torch.equal(image, before[0]) and torch.equal(classes, before[1])


def test_normalised_then_padded():
    rng = np.random.default_rng(6)
    images = torch.from_numpy(rng.integers(0, 256, (3, 3, 8, 10)).astype(np.uint8))
    sizes = torch.tensor([[8, 10], [5, 10], [3, 4]])
    maps = torch.zeros((3, 8, 10), dtype=torch.uint8)
    batch = SegmentationBatch(images, maps, sizes, torch.ones(3), torch.arange(3), ["a", "b", "c"])
    got = normalised(batch, AUGMENT.mean, AUGMENT.std)
    want = Normalize(AUGMENT)(images)
    want[1, :, 5:] = 0
    want[2, :, 3:] = 0
    want[2, :, :, 4:] = 0
    assert got.dtype == torch.float32 and torch.equal(got, want)
    assert torch.equal(normalised(batch, AUGMENT.mean, AUGMENT.std, torch.bfloat16), want.bfloat16())
    none = dataclasses.replace(batch, images=images[:0], sizes=sizes[:0])
    assert normalised(none, AUGMENT.mean, AUGMENT.std).shape == (0, 3, 8, 10)


def test_the_host_waits_for_nothing_when_it_normalises():
    with fake_cuda() as waits:
        batch = SegmentationBatch(
            torch.empty(2, 3, 8, 10, dtype=torch.uint8, device="cuda"),
            torch.empty(2, 8, 10, dtype=torch.uint8, device="cuda"),
            torch.empty(2, 2, dtype=torch.int64),
            torch.empty(2, device="cuda"),
            torch.arange(2),
            ["a", "b"],
        )
        assert normalised(batch, AUGMENT.mean, AUGMENT.std).shape == (2, 3, 8, 10)
    assert not waits.found, waits.report()


def test_a_plan_is_carried_out_where_the_pixels_are():
    """On a device all steps stay there; only a crop's counts are read back."""
    whole, crop = (
        plan_of(8, short_side=40, long_side=60, crop=size, distortion=True, max_class_share=1.0)
        for size in (None, (20, 30))
    )
    numbers = scene(np.random.default_rng(7), 30, 40)
    for plan in (whole, crop):
        for i in range(8):
            want = train_sample(*pair(numbers), plan, i)
            with fake_cuda() as waits:
                image = torch.empty(3, 30, 40, dtype=torch.uint8, device="cuda")
                classes = torch.empty(30, 40, dtype=torch.uint8, device="cuda")
                got = train_sample(image, classes, plan, i)
            assert [(x.shape, x.dtype, x.device.type) for x in got] == [
                (x.shape, x.dtype, "cuda") for x in want
            ]
            assert not waits.found, waits.report()
