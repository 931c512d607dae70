"""Anchors, deltas and matching, against torchvision's where both mean the same, else against mmdet's rules written out."""

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


def boxes(count: int, seed: int = 0, size: float = 100.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator) * size
    return torch.cat([low, low + 1 + torch.rand(count, 2, generator=generator) * size / 2], 1)


def test_anchors_are_torchvisions_but_not_rounded():
    shapes = [(6, 8), (3, 4)]
    found = Anchors((4.0, 6.5), (0.5, 1.0, 2.0), (8, 16))(shapes, CPU)
    theirs = AnchorGenerator(((32.0, 52.0), (64.0, 104.0)), ((0.5, 1.0, 2.0),) * 2)
    maps = [torch.zeros(1, 1, *shape) for shape in shapes]
    (expected,) = theirs(ImageList(torch.zeros(1, 3, 48, 64), [(48, 64)]), maps)
    assert torch.equal(torch.cat(found).round(), expected)
    assert found[0][0].tolist() == pytest.approx(
        [-16 * math.sqrt(2), -8 * math.sqrt(2), 16 * math.sqrt(2), 8 * math.sqrt(2)]
    )


def test_anchors_over_padding_take_no_part():
    anchors = Anchors((4.0,), (1.0,), (8, 32))
    flags = anchors.valid([(12, 16), (3, 4)], (40, 90), CPU)  # 64 x 96 where sides are rounded up to 32
    first, second = flags.split([12 * 16, 12])
    assert first.view(12, 16).nonzero().amax(0).tolist() == [7, 11]
    assert second.view(3, 4).nonzero().amax(0).tolist() == [1, 2]


@pytest.mark.parametrize("stds", [(1.0, 1.0, 1.0, 1.0), (0.1, 0.1, 0.2, 0.2)])
def test_deltas_are_torchvisions(stds):
    reference, truth = boxes(50, 1), boxes(50, 2)
    coder = BoxCoder(tuple(1 / each for each in stds))
    deltas = encode(reference, truth, stds)
    assert torch.allclose(deltas, coder.encode_single(truth, reference), atol=1e-4)
    assert torch.allclose(decode(reference, deltas, stds), truth, atol=1e-3)
    wild = torch.randn(50, 4, generator=torch.Generator().manual_seed(3)).mul(2).clamp(min=-4)
    assert torch.allclose(
        decode(reference, wild, stds), coder.decode_single(wild, reference), rtol=1e-4, atol=1e-3
    )


def test_decoded_boxes_grow_by_a_thousand_sixteenths_at_most_and_end_at_the_image():
    reference = torch.tensor([[10.0, 10.0, 26.0, 26.0]])
    found = decode(reference, torch.tensor([[0.0, 0.0, 99.0, -99.0]]), (1.0,) * 4)
    assert (found[0, 2] - found[0, 0]).item() == pytest.approx(1000, rel=1e-5)
    assert (found[0, 3] - found[0, 1]).item() == pytest.approx(16 * 16 / 1000, rel=1e-3)
    assert clip(found, (20, 300))[0].tolist() == pytest.approx([0, 17.872, 300, 18.128], abs=1e-3)
    assert torch.equal(
        decode(reference, torch.tensor([[0.0, 0.0, 99.0, -99.0]]), (1.0,) * 4, (20, 300)),
        clip(found, (20, 300)),
    )


@pytest.mark.parametrize("pairs", [matching.PAIRS, 97])
def test_matches_are_torchvisions(pairs, monkeypatch):
    """Which has no least IoU of low quality: 0 here."""
    monkeypatch.setattr(matching, "PAIRS", pairs)
    references, truth = boxes(400, 4), boxes(9, 5)
    for low_quality in (False, True):
        theirs = Matcher(0.5, 0.4, allow_low_quality_matches=low_quality)(box_iou(truth, references))
        found = match(references, truth, 0.5, 0.4, 0.0, low_quality)
        kept = theirs >= 0
        assert torch.equal(found < 0, ~kept)
        assert torch.equal(found[~kept], theirs[~kept])
        if not low_quality:
            assert torch.equal(found, theirs)


def test_low_quality_is_of_the_box_that_claims_it():
    """mmdet's rule: torchvision gives such a reference to the box that it overlaps most."""
    references = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]])
    truth = torch.tensor([[0.0, 0.0, 10.0, 9.0], [5.0, 0.0, 15.0, 10.0], [200.0, 200.0, 210.0, 210.0]])
    assert match(references, truth, 0.5, 0.4, 0.0, True).tolist() == [1, -1], (
        "the second claims what the first overlaps more"
    )
    assert match(references, truth, 0.5, 0.4, 0.4, True).tolist() == [0, -1], (
        "below the least IoU it has no claim"
    )
    assert match(references, truth[:0], 0.5, 0.4, 0.0, True).tolist() == [-1, -1]
    assert match(references[:0], truth, 0.5, 0.4, 0.0, True).tolist() == []
    assert match(references, torch.tensor([[0.0, 0.0, 10.0, 4.5]]), 0.5, 0.4, 0.5, True).tolist() == [-2, -1]


def test_matching_keeps_few_pairs_in_memory(monkeypatch):
    seen = []

    def watched(a, b):
        seen.append(len(a) * len(b))
        return box_iou(a, b)

    monkeypatch.setattr(matching, "box_iou", watched)
    match(boxes(60_000, 6), boxes(200, 7), 0.5, 0.4, 0.0, True)
    assert max(seen) <= matching.PAIRS and sum(seen) == 2 * 60_000 * 200
