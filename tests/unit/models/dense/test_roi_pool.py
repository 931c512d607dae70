"""Regions of a pyramid, and masks cut out by regions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import MultiScaleRoIAlign, masks_to_boxes, roi_align

from dattrain.models.dense.mask_targets import mask_targets
from dattrain.models.dense.roi_pool import levels_of, roi_pool

STRIDES = (4, 8, 16, 32)


def pyramid() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 512 // each, 640 // each, generator=generator) for each in STRIDES]


def some_regions() -> torch.Tensor:
    sides = torch.tensor([20.0, 111.9, 112.1, 223.0, 225.0, 447.0, 450.0, 500.0])
    boxes = torch.stack(
        [torch.full_like(sides, 7.3), torch.full_like(sides, 3.1), 7.3 + sides, 3.1 + sides], 1
    )
    return torch.cat([torch.tensor([0.0, 1.0]).repeat(4)[:, None], boxes], 1)


def test_levels_are_mmdet_s():
    assert levels_of(some_regions()[:, 1:], 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert levels_of(torch.tensor([[0.0, 0.0, 56.0, 224.0], [5.0, 5.0, 5.0, 9.0]]), 4).tolist() == [1, 0]


@pytest.mark.parametrize("size", [7, 14])
def test_a_region_is_roi_align_s_of_its_level(size):
    levels, regions = pyramid(), some_regions()
    found = roi_pool(levels, STRIDES, regions, size)
    for region, level, pooled in zip(regions, (0, 0, 1, 1, 2, 2, 3, 3), found, strict=True):
        one = roi_align(levels[level], region[None], size, 1 / STRIDES[level], -1, True)
        torch.testing.assert_close(pooled, one[0])
    assert tuple(roi_pool(levels, STRIDES, regions[:0], size).shape) == (0, 3, size, size)


def test_gradients_are_those_of_torchvision_s_pyramid():
    """Whose levels are chosen alike where half as many pixels are meant: canonical scale 224 at level 4 is 56 at level 2."""
    ours = [each.requires_grad_() for each in pyramid()]
    theirs = [each.detach().clone().requires_grad_() for each in ours]
    regions = some_regions()
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    levels = {str(number): each for number, each in enumerate(theirs)}
    pool(levels, [regions[regions[:, 0] == image, 1:] for image in (0, 1)], [(512, 640)] * 2).sum().backward()
    order = torch.cat([(regions[:, 0] == image).nonzero()[:, 0] for image in (0, 1)])
    roi_pool(ours, STRIDES, regions[order], 7).sum().backward()
    for a, b, stride in zip(ours, theirs, STRIDES, strict=True):
        # Sums alone: theirs shifts by half a pixel, and samples twice.
        torch.testing.assert_close(a.grad.sum(), b.grad.sum(), rtol=1e-3, atol=1e-3, msg=str(stride))


def test_regions_that_are_not_finite_do_no_harm():
    nan, inf = float("nan"), float("inf")
    regions = torch.tensor([[0, nan, nan, nan, nan], [1, 0, 0, 30, 30], [0, 5, 5, 5, 5], [0, nan, 0, inf, 4]])
    found = roi_pool(pyramid(), STRIDES, regions[:3], 7)
    assert not found[0].any() and found[1].any() and not found[2].any()


def drawn(height: int, width: int) -> torch.Tensor:
    """Bitmaps with the edges of real ones: an ellipse, a ring, a slanted bar, a star, two pieces, a small blob."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    angle = torch.atan2(y - 150, x - 200)
    radius = ((y - 150) ** 2 + (x - 200) ** 2).sqrt()
    ellipse = ((x - 90) / 70) ** 2 + ((y - 60) / 40) ** 2 <= 1
    ring = (radius <= 100) & (radius >= 55)
    bar = ((x + 2 * y - 300).abs() <= 25) & (y > 20) & (y < 140)
    star = radius <= 60 + 30 * torch.sin(5 * angle)
    pieces = ellipse | (((x - 260) / 30) ** 2 + ((y - 200) / 35) ** 2 <= 1)
    blob = ((x - 31) / 7) ** 2 + ((y - 200) / 9) ** 2 <= 1
    return torch.stack([ellipse, ring, bar, star, pieces, blob])


@pytest.mark.parametrize(("grid", "least"), [(112, 0.99), (56, 0.98)])
def test_targets_are_those_of_full_size_bitmaps(grid, least):
    """mmdet's way, for regions that are matched: those that lie beside, in and around an object's box."""
    bitmaps = drawn(256, 320)
    boxes = masks_to_boxes(bitmaps) + torch.tensor([0.0, 0.0, 1.0, 1.0])
    over = torch.cat([torch.arange(len(boxes))[:, None], boxes], 1)
    # Over its own box by areas: a grid of so many cells, each the mean of 8 x 8 places.
    fine = roi_align(bitmaps[:, None].float(), over, grid * 8, 1.0, 1, True)
    fine = (fine >= 0.5).float()
    masks = (F.avg_pool2d(fine, 8)[:, 0] * 255).round().to(torch.uint8)

    generator = torch.Generator().manual_seed(0)
    objects = torch.arange(len(boxes)).repeat(30)
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)[objects]
    shifts = (torch.rand(len(objects), 4, generator=generator) - 0.5) * 0.3
    shifts[: len(boxes)] = 0  # the object's own box
    limits = torch.tensor([320.0, 256.0, 320.0, 256.0])
    regions = torch.minimum((boxes[objects] + shifts * sides).clamp(min=0), limits)
    expected = roi_align(
        bitmaps[:, None].float(), torch.cat([objects[:, None], regions], 1), 28, 1.0, 0, True
    )
    found = mask_targets(masks, boxes, objects, regions)
    assert tuple(found.shape) == (180, 28, 28)
    assert set(found.unique().tolist()) == {0.0, 1.0}
    same = (found == (expected[:, 0] >= 0.5)).float().mean((1, 2))
    for number in range(len(boxes)):
        assert float(same[objects == number].mean()) > least - 0.02 * (number == 5), number  # 14 x 18 pixels
    assert float(same.mean()) > least
    assert 0.2 < float(found.mean()) < 0.8


def test_a_small_grid_a_large_region_and_what_is_outside():
    masks = torch.full((1, 4, 4), 255, dtype=torch.uint8)
    masks[0, :, 2:] = 0
    box = torch.tensor([[10.0, 20.0, 30.0, 40.0]])
    objects = torch.zeros(4, dtype=torch.int64)
    regions = torch.tensor(
        [[10.0, 20.0, 30.0, 40.0], [0.0, 20.0, 40.0, 40.0], [10.0, 0.0, 30.0, 60.0], [60.0, 60.0, 80.0, 80.0]]
    )
    whole, wide, tall, beside = mask_targets(masks, box, objects, regions, size=4)
    half = torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert torch.equal(whole, half.expand(4, 4))
    assert torch.equal(wide, torch.tensor([0.0, 1.0, 0.0, 0.0]).expand(4, 4))
    assert torch.equal(tall[[0, 3]], torch.zeros(2, 4)) and torch.equal(tall[1:3], half.expand(2, 4))
    assert not beside.any()
    # A grid far finer than the region's cells is averaged, not probed: a chessboard covers half of each.
    chess = (torch.arange(64)[:, None] + torch.arange(64)) % 2 == 0
    board = torch.where(chess, 200, 60).to(torch.uint8)[None]
    assert mask_targets(board, box, objects[:1], regions[:1], size=4).all()
    assert not mask_targets(board - 10, box, objects[:1], regions[:1], size=4).any()
    assert tuple(mask_targets(masks[:0], box[:0], objects[:0], regions[:0]).shape) == (0, 28, 28)
