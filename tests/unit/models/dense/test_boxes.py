"""Anchors, deltas and matching, against torchvision's where both mean the same, else against mmdet's rules written out."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from dattrain.models.dense import matching
from dattrain.models.dense.anchors import Anchors
from dattrain.models.dense.boxes import clip, decode, encode
from dattrain.models.dense.matching import match

CPU = torch.device("cpu")


def boxes(count: int, seed: int, size: float = 100.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator) * size
    return torch.cat([low, low + 1 + torch.rand(count, 2, generator=generator) * size / 2], 1)


def test_anchors_are_torchvision_s_but_not_rounded(monkeypatch):
    shapes = [(6, 8), (3, 4)]
    found = Anchors((4.0, 6.5), (0.5, 1.0, 2.0), (8, 16))(shapes, CPU)
    monkeypatch.setattr(torch.Tensor, "round", lambda self: self)
    theirs = AnchorGenerator(((32.0, 52.0), (64.0, 104.0)), ((0.5, 1.0, 2.0),) * 2)
    maps = [torch.zeros(1, 1, *shape) for shape in shapes]
    (expected,) = theirs(ImageList(torch.zeros(1, 3, 48, 64), [(48, 64)]), maps)
    torch.testing.assert_close(torch.cat(found), expected)
    wide = [-16 * math.sqrt(2), -8 * math.sqrt(2), 16 * math.sqrt(2), 8 * math.sqrt(2)]
    assert found[0][0].tolist() == pytest.approx(wide)  # centred on the first pixel


def test_anchors_over_what_another_image_made_padding_are_not_valid():
    anchors = Anchors((4.0,), (1.0, 2.0), (8, 32))
    flags = anchors.valid([(12, 16), (3, 4)], (40, 90), CPU)  # 64 x 96 where sides are rounded up to 32
    expected = []
    for of_level, stride in zip(anchors([(12, 16), (3, 4)], CPU), (8, 32)):
        x, y = ((of_level[:, side] + of_level[:, side + 2]) / 2 for side in (0, 1))
        expected.append((y < 64) & (x < 96))
        assert int(expected[-1].sum()) == 2 * (64 // stride) * (96 // stride)
    assert torch.equal(flags, torch.cat(expected))
    assert anchors.valid([(12, 16), (3, 4)], (96, 128), CPU).all()


@pytest.mark.parametrize("stds", [(1.0, 1.0, 1.0, 1.0), (0.1, 0.1, 0.2, 0.2)])
def test_deltas_are_torchvision_s(stds):
    reference, truth = boxes(50, 1), boxes(50, 2)
    coder = BoxCoder(tuple(1 / each for each in stds))
    deltas = encode(reference, truth, stds)
    torch.testing.assert_close(deltas, coder.encode_single(truth, reference), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decode(reference, deltas, stds), truth, rtol=1e-4, atol=1e-3)
    drawn = torch.randn(50, 4, generator=torch.Generator().manual_seed(3))
    expected = coder.decode_single(drawn, reference)
    torch.testing.assert_close(decode(reference, drawn, stds), expected, rtol=1e-4, atol=1e-3)
    assert decode(reference, drawn.bfloat16(), stds).dtype == torch.float32


def test_decoded_boxes_grow_by_a_thousand_sixteenths_at_most_and_end_at_the_image():
    reference, wild = torch.tensor([[10.0, 10.0, 26.0, 26.0]]), torch.tensor([[0.0, 0.0, 99.0, -99.0]])
    found = decode(reference, wild, (1.0,) * 4)
    assert (found[0, 2] - found[0, 0]).item() == pytest.approx(1000, rel=1e-5)
    assert (found[0, 3] - found[0, 1]).item() == pytest.approx(16 * 16 / 1000, rel=1e-3)
    assert clip(found, (20, 300))[0].tolist() == pytest.approx([0, 17.872, 300, 18.128], abs=1e-3)
    assert torch.equal(decode(reference, wild, (1.0,) * 4, (20, 300)), clip(found, (20, 300)))


def by_mmdet_s_rules(references, truth, positive, negative, minimum, low_quality):
    """``MaxIoUAssigner``'s, one box after the other, over all pairs at once."""
    matched = torch.full((len(references),), -2)
    if not len(truth):
        return matched.fill_(-1)
    iou = box_iou(truth, references)
    best, index = iou.max(0)
    matched[best < negative] = -1
    matched[best >= positive] = index[best >= positive]
    for number, of_box in enumerate(iou if low_quality else ()):
        if of_box.max() >= minimum:
            matched[of_box == of_box.max()] = number
    return matched


@pytest.mark.parametrize("pairs", [matching.PAIRS, 4 * 97, 1])
def test_matches_do_not_depend_on_how_many_pairs_are_in_memory(pairs, monkeypatch):
    monkeypatch.setattr(matching, "PAIRS", pairs)
    # Whole pixels, so that there are equal overlaps.
    references, truth = (boxes(97, 4) / 8).round() * 8 + torch.tensor([0, 0, 4, 4]), boxes(11, 5).round()
    truth = torch.cat([truth, truth[:3]])
    seen = set()
    for thresholds in ((0.5, 0.4, 0.0), (0.7, 0.3, 0.3), (0.5, 0.5, 0.5)):
        without = match(references, truth, *thresholds, low_quality=False)
        assert torch.equal(without, Matcher(*thresholds[:2])(box_iou(truth, references)))
        found = match(references, truth, *thresholds, low_quality=True)
        assert torch.equal(found, by_mmdet_s_rules(references, truth, *thresholds, low_quality=True))
        theirs = Matcher(*thresholds[:2], allow_low_quality_matches=True)(box_iou(truth, references))
        if not thresholds[2]:  # torchvision knows no least overlap
            assert torch.equal(found < 0, theirs < 0)
            assert torch.equal(found[found < 0], theirs[theirs < 0])
        seen |= set(found.tolist())
    assert {-2, -1} < seen


def test_low_quality_is_of_the_box_that_claims_it():
    """mmdet's rule: torchvision leaves such a reference to the box that it overlaps most."""
    references = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]])
    truth = torch.tensor([[0.0, 0.0, 10.0, 9.0], [5.0, 0.0, 15.0, 10.0], [200.0, 200.0, 210.0, 210.0]])
    assert match(references, truth, 0.5, 0.4, 0.0, True).tolist() == [1, -1]
    assert match(references, truth, 0.5, 0.4, 0.4, True).tolist() == [0, -1]  # .33 is below the least
    assert match(references, truth[:0], 0.5, 0.4, 0.0, True).tolist() == [-1, -1]
    assert match(references[:0], truth, 0.5, 0.4, 0.0, True).tolist() == []
    between = torch.tensor([[0.0, 0.0, 10.0, 4.5]])
    assert match(references, between, 0.5, 0.4, 0.5, True).tolist() == [-2, -1]
    without_area = torch.tensor([[3.0, 3.0, 3.0, 8.0]])
    assert match(references, without_area, 0.5, 0.4, 0.0, True).tolist() == [-1, -1]


def test_matching_keeps_few_pairs_in_memory(monkeypatch):
    seen = []

    def watched(a, b):
        seen.append(len(a) * len(b))
        return torch.zeros(len(a), len(b))

    monkeypatch.setattr(matching, "box_iou", watched)
    match(boxes(270_000, 6), boxes(40, 7), 0.5, 0.4, 0.0, True)
    assert max(seen) <= matching.PAIRS
    assert sum(seen) == 270_000 * 40
