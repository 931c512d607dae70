"""Heads of RetinaNet, Mask and Cascade R-CNN: against torchvision's with the same weights, and as mmdet draws them."""

from __future__ import annotations

from math import log, sqrt

import pytest
import torch
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead as TheirRPNHead

from dattrain.models.dense.rcnn import BoxHead, MaskHead, RPNHead
from dattrain.models.dense.retina import RetinaHead

CLASSES, CHANNELS, ANCHORS = 5, 8, 3


def levels() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, CHANNELS, *size, generator=generator) for size in ((6, 9), (3, 5))]


def copy(ours: nn.Module, *theirs: nn.Module) -> None:
    """Weights of ours into theirs, whose parameters come in the same order."""
    own = list(ours.parameters())
    other = [parameter for module in theirs for parameter in module.parameters()]
    with torch.no_grad():
        for source, target in zip(own, other, strict=True):
            target.copy_(source)


def flat(per_level: list[torch.Tensor], numbers: int) -> torch.Tensor:
    """As torchvision lays predictions out: B x (places, then anchors, of all levels) x numbers."""
    return torch.cat(
        [each.unflatten(1, (-1, numbers)).permute(0, 3, 4, 1, 2).flatten(1, 3) for each in per_level], 1
    )


def test_retina_head_is_torchvision_s():
    torch.manual_seed(0)
    ours = RetinaHead(CLASSES, channels=CHANNELS, anchors=ANCHORS)
    theirs = RetinaNetHead(CHANNELS, ANCHORS, CLASSES)
    reordered = nn.ModuleList([ours.class_tower, ours.classes, ours.box_tower, ours.boxes])
    theirs_in_order = (
        theirs.classification_head.conv,
        theirs.classification_head.cls_logits,
        theirs.regression_head.conv,
        theirs.regression_head.bbox_reg,
    )
    copy(reordered, *theirs_in_order)
    logits, deltas = ours(levels())
    expected = theirs(levels())
    torch.testing.assert_close(flat(logits, CLASSES), expected["cls_logits"])
    torch.testing.assert_close(flat(deltas, 4), expected["bbox_regression"])


def test_rpn_head_is_torchvision_s():
    torch.manual_seed(0)
    ours, theirs = RPNHead(channels=CHANNELS, anchors=ANCHORS), TheirRPNHead(CHANNELS, ANCHORS)
    copy(ours, theirs)
    for found, expected in zip(ours(levels()), theirs(levels()), strict=True):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_box_and_mask_heads_are_torchvision_s():
    torch.manual_seed(0)
    regions = torch.randn(4, CHANNELS, 7, 7)
    ours = BoxHead(CLASSES, channels=CHANNELS, hidden=16)
    mlp, predictor = TwoMLPHead(CHANNELS * 49, 16), FastRCNNPredictor(16, CLASSES + 1)
    predictor.bbox_pred = nn.Linear(16, 4 * CLASSES)  # theirs has boxes for the background, too
    copy(ours, mlp, predictor)
    for a, b in zip(ours(regions), predictor(mlp(regions)), strict=True):
        torch.testing.assert_close(a, b)

    masks = MaskHead(CLASSES, channels=CHANNELS)
    theirs = nn.Sequential(
        MaskRCNNHeads(CHANNELS, (CHANNELS,) * 4, 1), MaskRCNNPredictor(CHANNELS, CHANNELS, CLASSES)
    )
    copy(masks, theirs)
    found = masks(torch.randn(4, CHANNELS, 14, 14, generator=torch.Generator().manual_seed(2)))
    expected = theirs(torch.randn(4, CHANNELS, 14, 14, generator=torch.Generator().manual_seed(2)))
    assert tuple(found.shape) == (4, CLASSES, 28, 28)
    torch.testing.assert_close(found, expected)


def test_no_regions_are_no_predictions():
    for head in (
        BoxHead(CLASSES, channels=CHANNELS),
        BoxHead(CLASSES, channels=CHANNELS, convs=4, linears=1, norm="group"),
    ):
        logits, deltas = head(torch.empty(0, CHANNELS, 7, 7))
        assert (tuple(logits.shape), tuple(deltas.shape)) == ((0, CLASSES + 1), (0, 4 * CLASSES))
    masks = MaskHead(CLASSES, channels=CHANNELS)(torch.empty(0, CHANNELS, 14, 14))
    assert tuple(masks.shape) == (0, CLASSES, 28, 28)


@pytest.mark.parametrize(("channels", "std"), [(256, 0.01), (64, 0.02)])
def test_weights_are_drawn_as_mmdet_draws_them(channels, std):
    """Narrower towers with the gain that 256 channels have."""
    torch.manual_seed(0)
    retina, rpn = RetinaHead(20, channels=channels), RPNHead(channels=channels)
    for module in (*retina.modules(), *rpn.modules()):
        if isinstance(module, nn.Conv2d):
            assert float(module.weight.detach().std()) == pytest.approx(std, rel=0.1)
            assert module is retina.classes or not module.bias.any()
    assert retina.classes.bias.detach().sigmoid().tolist() == pytest.approx([0.01] * 180)
    assert float(retina.classes.bias.detach()[0]) == pytest.approx(-log(99))

    box = BoxHead(80, channels=64, convs=4, linears=1, hidden=256, norm="group")
    assert float(box.classes.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    assert float(box.boxes.weight.detach().std()) == pytest.approx(0.001, rel=0.05)
    bound = sqrt(6 / (64 * 49 + 256))
    assert float(box.linears[0].weight.detach().abs().max()) == pytest.approx(bound, rel=0.01)
    assert [conv[0].bias is None for conv in box.convs] == [True] * 4
    mask = MaskHead(80, channels=64)
    assert all(conv[0].bias is not None and len(conv) == 2 for conv in mask.convs)
    for module, fan_out in ((mask.convs[0][0], 64 * 9), (mask.upsample, 64 * 4), (mask.masks, 80)):
        assert float(module.weight.detach().std()) == pytest.approx(sqrt(2 / fan_out), rel=0.06)
