"""Boxes and masks where the pixels went, copy-paste, and how little memory crowded masks take."""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import objects
import pytest
import torch

from dattrain.config.data_sections import Augment, Geometry
from dattrain.data.annotations import segmentations
from dattrain.data.annotations.instances import Instances
from dattrain.data.augment import placed_objects
from dattrain.data.augment.dense_transforms import distort
from dattrain.data.augment.detection_plan import DetectionPlan, draw
from dattrain.data.augment.detection_transforms import StoredImage, lay, no_targets, train_sample
from dattrain.data.augment.placed_objects import coverage, place
from dattrain.data.augment.placement import Placement
from dattrain.data.detection_batch import GRID

SMALL = {
    "short_side": 64, "short_sides": (40, 90), "long_side": 120, "scale": (1.0, 1.0), "crop": None, "distortion": False,
    "precrop_short_sides": (50, 60), "precrop_sides": (32, 50),
}  # fmt: skip
CROPPED = {"precrop": 1.0, "scale": (0.5, 2.0), "crop": 48}


def plan_of(count: int, partner: list[int] | None = None, **geometry) -> DetectionPlan:
    own = None if partner is None else np.array(partner)
    settings = Geometry(**{**SMALL, **geometry})
    return draw(settings, Augment(interpolation="bilinear"), 1, np.arange(count), own)


def stored(index: int, *, masks: bool = True) -> StoredImage:
    pixels, shapes = objects.scene(0, index)
    rows = [objects.annotation(shape, i, 0) for i, shape in enumerate(shapes)]
    found = Instances(
        boxes=np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4),
        classes=np.array([shape.number for shape in shapes], np.int64),
        area=np.array([row["area"] for row in rows], np.float64),
        crowd=np.zeros(len(rows), bool),
        segmentations=tuple(row["segmentation"] if masks else None for row in rows),
        size=pixels.shape[:2],
    )
    return StoredImage(torch.from_numpy(pixels).permute(2, 0, 1), found)


def masks_of(image: StoredImage) -> list[np.ndarray]:
    return [segmentations.mask(one, image.size, "") for one in image.objects.segmentations]


def test_coverage_by_hand():
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2:5] = True
    assert coverage(mask, (0, 0, 6, 4), 2).tolist() == [[42, 85], [42, 85]]  # 1/6 and 2/6 of 255
    assert coverage(mask, (2, 1, 5, 3), 3).tolist() == [[255] * 3] * 3
    # Cells of half a pixel, from the middle of a pixel on.
    assert coverage(mask, (1.5, 0.5, 2.5, 1.5), 2).tolist() == [[0, 0], [0, 255]]
    assert coverage(~mask, (1.25, 1, 2.25, 2), 1).tolist() == [[191]]  # .75


def test_coverage_is_the_area():
    """Against pixels cut into 20 x 20 pieces, whose centres say which cell they are in."""
    random = np.random.default_rng(0)
    for _ in range(20):
        mask = random.random((9, 14)) < 0.5
        left, top = random.uniform(0, 5, 2)
        right, bottom = left + random.uniform(1, 8), top + random.uniform(1, 3.9)
        fine = np.repeat(np.repeat(mask, 20, 0), 20, 1)
        y, x = ((np.arange(side) + 0.5) / 20 for side in fine.shape)
        cells = [
            np.floor((at - a) / (b - a) * 3).astype(int) for at, a, b in ((y, top, bottom), (x, left, right))
        ]
        found = coverage(mask, (left, top, right, bottom), 3) / 255
        for i in range(3):
            for j in range(3):
                assert found[i, j] == pytest.approx(fine[cells[0] == i][:, cells[1] == j].mean(), abs=0.12)
    sums = coverage(np.ones((500, 700), bool), (0.3, 0.7, 699.9, 499.2))
    assert (sums == 255).all()


def painted(targets, shape: tuple[int, int], number: int) -> np.ndarray:
    """The grid of an object laid over its box: H x W of 0 to 1."""
    left, top, right, bottom = targets.boxes[number].tolist()
    y, x = np.arange(shape[0]) + 0.5, np.arange(shape[1]) + 0.5
    rows, columns = (y - top) / (bottom - top) * GRID, (x - left) / (right - left) * GRID
    out = np.zeros(shape)
    inside = ((rows >= 0) & (rows < GRID))[:, None] & ((columns >= 0) & (columns < GRID))[None, :]
    values = targets.masks[number][rows.clip(0, GRID - 1).astype(int)][
        :, columns.clip(0, GRID - 1).astype(int)
    ]
    out[inside] = values[inside] / 255
    return out


@pytest.mark.parametrize("geometry", [{}, CROPPED, {"crop": (40, 90), "scale": (0.1, 2.0)}], ids=str)
def test_boxes_and_masks_lie_where_the_pixels_are(geometry):
    """An image whose colours are its objects' numbers goes the same way, and then says where they are."""
    kept = dropped = 0
    for index in range(20):
        image = stored(index)
        plan = plan_of(20, **geometry)
        result, targets = train_sample(image, plan, index, masks=True)
        shape = tuple(result.shape[1:])
        placement = plan.placement(index, *image.size)
        assert shape == placement.shape
        number = 0
        for own, mask in enumerate(masks_of(image)):
            grey = torch.from_numpy(mask).mul(255).to(torch.uint8).expand(3, -1, -1)
            truth = lay(grey, placement, "bilinear")[0].numpy() / 255
            x, y, w, h = image.objects.boxes[own]
            box = placement.boxes(np.array([[x, y, x + w, y + h]])).clip(0, [*shape[::-1]] * 2)[0]
            if min(box[2:] - box[:2]) < 1:
                assert truth.sum() < 1.5 * max(shape)
                dropped += 1
                continue
            np.testing.assert_allclose(targets.boxes[number], box, atol=1e-4)
            assert targets.labels[number] == image.objects.classes[own]
            there = painted(targets, shape, number)
            # Between these is the edge, which the resize of the image blurs.
            assert (there[truth == 1] > 0.99).all() and (there[truth == 0] < 0.01).all()
            area = targets.masks[number].mean() / 255 * np.prod(box[2:] - box[:2])
            assert area == pytest.approx(truth.sum(), rel=0.05, abs=4)
            number += 1
        kept += number
        assert (
            len(targets) == number and targets.boxes.dtype == np.float32 and targets.masks.dtype == np.uint8
        )
        assert targets.masks.shape == (number, GRID, GRID)
        boxes_alone = train_sample(stored(index, masks=False), plan, index, masks=False)[1]
        np.testing.assert_array_equal(boxes_alone.boxes, targets.boxes)
        assert boxes_alone.masks.shape == (number, 0, 0)
    assert kept > 20 and (dropped > 2) == bool(geometry)


def test_the_image_goes_by_its_plan():
    image = stored(1)
    plan = plan_of(40, distortion=True, **CROPPED)
    for i in range(40):
        placed = plan.placement(i, *image.size)
        top, left, height, width = placed.box
        want = torch.nn.functional.interpolate(
            image.image[None, :, top : top + height, left : left + width].float(), size=placed.size, mode="bilinear", antialias=True
        )[0, :, placed.rows, placed.columns]  # fmt: skip
        want = want.round().to(torch.uint8).flip(2) if placed.flip else want.round().to(torch.uint8)
        found = lay(image.image, placed, "bilinear")
        assert (found.int() - want.int()).abs().max() <= 1
        result, _ = train_sample(image, plan, i, masks=True)
        assert torch.equal(result, distort(found, plan.dense, i))
    assert plan.dense.flip.any() and not plan.dense.flip.all()


# --- copy-paste ------------------------------------------------------------------------------------------------------


def test_what_is_pasted_lies_above_all_and_hides_what_is_beneath():
    """Against whole masks of both images, as nearest pixels give them."""
    touched = 0
    for index in range(40):
        own, other = stored(2 * index), stored(2 * index + 1)
        partner = [-1] * 80
        partner[2 * index] = 2 * index + 1
        plan = plan_of(80, partner, distortion=False)
        result, targets = train_sample(own, plan, 2 * index, masks=True, partner=other)
        placements = [plan.placement(2 * index, *own.size), plan.placement(2 * index + 1, *other.size)]
        height, width = placements[0].shape
        layers = []
        for image, placement in zip((own, other), placements):
            y, x = placement.sources(*(slice(0, side) for side in placement.shape))
            room = np.zeros((len(image.objects), *np.maximum(placement.shape, (height, width))), bool)
            for layer, mask in zip(room, masks_of(image)):
                layer[: len(y), : len(x)] = mask[y][:, x]
            layers.append(room[:, :height, :width])
        seen = place(other.objects, other.size, placements[1].cut(height, width))
        chosen = seen.index[plan.pasted(2 * index, len(seen))]
        above = layers[1][chosen].any(0)
        before = lay(own.image, placements[0], "bilinear")
        pasted = torch.zeros_like(before)
        laid = lay(other.image, placements[1], "bilinear")[:, :height, :width]
        pasted[:, : laid.shape[1], : laid.shape[2]] = laid
        assert torch.equal(result, torch.where(torch.from_numpy(above), pasted, before))
        # The objects beneath come first, then those that were pasted.
        beneath = len(targets) - len(chosen)
        number = 0
        for one in place(own.objects, own.size, placements[0]).index.tolist():
            mask = layers[0][one]
            left = mask & ~above
            if left.sum() < mask.sum():
                touched += 1
                if not left.any():
                    continue
                ys, xs = np.nonzero(left)
                tight = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
                ys, xs = np.nonzero(mask)
                moved = np.abs(tight - [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).max()
                if left.sum() <= 300 and moved > 10:
                    continue
                assert targets.boxes[number].tolist() == tight.tolist()
                there = painted(targets, (height, width), number)
                np.testing.assert_array_equal(there > 0.5, left)
            assert targets.labels[number] == own.objects.classes[one]
            number += 1
        assert number == beneath
        assert targets.labels[number:].tolist() == other.objects.classes[chosen].tolist()
        for i, one in enumerate(chosen.tolist()):
            there = painted(targets, (height, width), number + i) > 0.5
            assert (there != layers[1][one]).sum() <= 0.1 * layers[1][one].sum() + 6
        without = train_sample(own, plan, 2 * index, masks=False, partner=other)[1]
        np.testing.assert_array_equal(without.boxes, targets.boxes)
    assert touched > 8


def hidden(beneath: tuple[int, int, int, int], above: tuple[int, int, int, int]) -> np.ndarray:
    """Boxes of what is left of one box (left, top, right, bottom) under another, at their stored size."""

    def image(box: tuple[int, int, int, int]) -> StoredImage:
        left, top, right, bottom = box
        polygon = [[left, top, right, top, right, bottom, left, bottom]]
        boxes = np.array([[left, top, right - left, bottom - top]], np.float64)
        one = Instances(boxes, np.array([0]), np.ones(1), np.zeros(1, bool), (polygon,), (64, 64))
        return StoredImage(torch.zeros(3, 64, 64, dtype=torch.uint8), one)

    plan = plan_of(400, [1] + [-1] * 399, short_sides=())
    seed = next(seed for seed in range(100) if len(dataclasses.replace(plan, seed=seed).pasted(0, 1)))
    plan = dataclasses.replace(plan, seed=seed)
    plan.dense.flip[:] = False
    found = train_sample(image(beneath), plan, 0, masks=True, partner=image(above))[1]
    np.testing.assert_array_equal(found.boxes[-1], above)
    return found.boxes[:-1]


def test_an_object_that_is_hidden_goes():
    assert hidden((10, 10, 30, 30), (10, 10, 30, 30)).tolist() == []
    assert hidden((10, 10, 30, 30), (5, 5, 40, 40)).tolist() == []
    # 20 x 10 pixels are left, and a side moved by 10; by 11, it goes; with more than 300 pixels it stays.
    assert hidden((10, 10, 30, 30), (10, 10, 30, 20)).tolist() == [[10, 20, 30, 30]]
    assert hidden((10, 10, 30, 30), (10, 10, 30, 21)).tolist() == []
    assert hidden((10, 10, 45, 30), (10, 10, 45, 21)).tolist() == [[10, 21, 45, 30]]
    # A corner: the box stays.
    assert hidden((10, 10, 30, 30), (25, 25, 60, 60)).tolist() == [[10, 10, 30, 30]]


def test_nothing_is_pasted_where_nothing_is_chosen():
    own, empty = stored(0), stored(6)
    assert not len(empty.objects)
    plan = plan_of(2, [1, -1])
    want = train_sample(own, plan_of(2), 0, masks=True)
    found = train_sample(own, plan, 0, masks=True, partner=empty)
    assert torch.equal(found[0], want[0])
    for name in ("boxes", "labels", "masks"):
        np.testing.assert_array_equal(getattr(found[1], name), getattr(want[1], name))
    assert no_targets(True).masks.shape == (0, GRID, GRID)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("polygons", [True, False])
def test_sixty_crowded_masks_take_the_memory_of_one(polygons, monkeypatch):
    """At 800 x 1333, where all of them at once would be 64 MB: no array is larger than the image, nor are all together."""
    size, random = (800, 1333), np.random.default_rng(0)
    boxes, segmentations = [], []
    for _ in range(60):
        x, y, w, h = *random.integers(0, (900, 400)), *random.integers(200, 400, 2)
        boxes.append([x, y, w, h])
        corners = [[int(x), int(y), int(x + w), int(y), int(x + w), int(y + h), int(x), int(y + h)]]
        lengths = np.diff(
            [0, *(np.arange(x, x + w)[:, None] * size[0] + [y, y + h]).ravel(), size[0] * size[1]]
        )
        segmentations.append(corners if polygons else {"size": list(size), "counts": lengths.tolist()})
    crowd = Instances(
        np.array(boxes, float), np.zeros(60, np.int64), np.ones(60), np.zeros(60, bool), tuple(segmentations), size
    )  # fmt: skip
    largest = 0
    whole = placed_objects.segmentations.mask

    def mask(*args):
        nonlocal largest
        found = whole(*args)
        largest = max(largest, found.nbytes if found.base is None else found.base.nbytes)
        return found

    monkeypatch.setattr(placed_objects.segmentations, "mask", mask)
    plain = Placement((0, 0, *size), size, slice(0, 800), slice(0, 1333), False)
    placed = place(crowd, size, plain)
    tracemalloc.start()
    grids = np.stack([placed.coverage(i) for i in range(60)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (grids == 255).all()
    assert 0 < largest <= 400 * 800, "a mask is made of its box's columns alone"
    assert peak < 8e6
