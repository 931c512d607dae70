"""RetinaNet: its losses against torchvision's parts put together by mmdet's rules, and what it finds."""

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, sigmoid_focal_loss

from dattrain.models import create
from dattrain.models.dense import create_backbone, create_detector
from dattrain.models.dense.create_detector import outs
from dattrain.models.dense.detector import by_anchor, shapes_of
from dattrain.models.dense.weights import initialise


def retinanet(classes: int = 3, seed: int = 0, **settings):
    torch.manual_seed(seed)
    backbone = create_backbone("dat_atto", img_size=64, outs=outs("retinanet"), **settings)
    return create_detector(backbone, "retinanet", classes, channels=32)


def target(*rows):
    values = torch.tensor([row[:4] for row in rows], dtype=torch.float32).view(-1, 4)
    return {"boxes": values, "labels": torch.tensor([row[4] for row in rows], dtype=torch.int64)}


TARGETS = [target((10, 10, 40, 50, 0), (50, 50, 90, 80, 2), (12, 8, 44, 48, 1)), target((20, 5, 60, 60, 1))]
SIZES = [(96, 96), (64, 70)]


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 96, 96, generator=torch.Generator().manual_seed(1))


def expected(model, x, sizes, targets):
    """By loops over all anchors."""
    levels = model.neck(model.backbone(x))
    logits, deltas = model.head(levels)
    logits, deltas = torch.cat(by_anchor(logits, 3), 1), torch.cat(by_anchor(deltas, 4), 1)
    anchors = torch.cat(model.anchors(shapes_of(levels), x.device))
    focal = boxes = 0.0
    positives = 0
    for image, one in enumerate(targets):
        if one is None:
            continue
        iou = box_iou(one["boxes"], anchors)
        matched = torch.full((len(anchors),), -2)
        if len(one["boxes"]):
            best, number = iou.max(0)
            matched[best < 0.4] = -1
            matched[best >= 0.5] = number[best >= 0.5]
            for box in range(len(one["boxes"])):
                if iou[box].max() > 0:
                    matched[iou[box] == iou[box].max()] = box
        else:
            matched[:] = -1
        matched[~model.anchors.valid(shapes_of(levels), sizes[image], x.device)] = -2
        truth = torch.zeros(len(anchors), 3)
        for anchor in (matched >= 0).nonzero()[:, 0]:
            truth[anchor, one["labels"][matched[anchor]]] = 1
        focal += sigmoid_focal_loss(logits[image], truth, 0.25, 2.0)[matched > -2].sum()
        own = matched >= 0
        wanted = BoxCoder((1.0,) * 4).encode_single(one["boxes"][matched[own]], anchors[own])
        boxes += (deltas[image][own] - wanted).abs().sum()
        positives += int(own.sum())
    return {"loss_cls": focal / max(positives, 1), "loss_bbox": boxes / max(positives, 1)}


@pytest.mark.parametrize("targets", [TARGETS, [TARGETS[0], target()], [None, TARGETS[1]]])
def test_losses(targets):
    model, x = retinanet().train(), images()
    found, wanted = model(x, SIZES, targets), expected(model, x, SIZES, targets)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(float(wanted[name]), rel=1e-4)


@pytest.mark.parametrize("targets", [[target(), target()], [None, None], [None, target()]])
def test_nothing_to_learn_from_has_finite_losses_and_gradients_everywhere(targets):
    model = retinanet().train()
    found = model(images(), SIZES, targets)
    torch.stack(list(found.values())).sum().backward()
    assert all(torch.isfinite(each) for each in found.values())
    assert [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_boxes_and_losses_are_fp32_under_autocast_and_with_half_weights(dtype):
    model, x = retinanet().train(), images()
    whole = model(x, SIZES, TARGETS)
    with torch.autocast("cpu", dtype):
        mixed = model(x, SIZES, TARGETS)
    half = model.to(dtype)(x.to(dtype), SIZES, TARGETS)
    for found in (mixed, half):
        for name, value in found.items():
            assert value.dtype == torch.float32
            assert value.item() == pytest.approx(whole[name].item(), rel=0.03)
    (one, _) = model.eval()(x.to(dtype), SIZES)
    assert one["boxes"].dtype == one["scores"].dtype == torch.float32


def test_drop_path_is_a_function_of_the_sample():
    model, x = retinanet(drop_path_rate=0.5).train(), images()
    noise = torch.rand(2, model.num_drop_path, generator=torch.Generator().manual_seed(0))
    first, again = (model(x, SIZES, TARGETS, noise)["loss_cls"] for _ in range(2))
    other = model(x, SIZES, TARGETS, noise.flip(1))["loss_cls"]
    assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(ValueError, match="drop_path_noise"):
        model(x, SIZES, TARGETS, noise[:, 1:])


def test_it_finds_what_it_was_shown():
    model, x = retinanet().train(), images(1)[:, :, :64, :64]
    sizes, targets = [(56, 60)], [target((12, 8, 44, 42, 2))]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(70):
        loss = torch.stack(list(model(x, sizes, targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        (found,) = model(x, sizes)
        model.max_detections = 1
        assert len(model(x, sizes)[0]["boxes"]) == 1 < len(found["boxes"])
    assert torch.equal(found["scores"], found["scores"].sort(descending=True).values)
    assert (found["boxes"] <= torch.tensor([60, 56, 60, 56])).all()
    assert box_iou(found["boxes"][:1], targets[0]["boxes"]).item() > 0.6
    assert found["labels"][0] == 2


def test_weights_of_a_classification_and_of_a_detector():
    torch.manual_seed(3)
    model = retinanet()
    source = create("dat_atto", num_classes=10, img_size=64).state_dict()
    report = initialise(model, source)
    assert torch.equal(
        model.state_dict()["backbone.body.stages.0.blocks.0.mlp.fc1.weight"],
        source["stages.0.blocks.0.mlp.fc1.weight"],
    )
    new = {entry.name for entry in report.entries if entry.status == "new"}
    assert new == {name for name in model.state_dict() if not name.startswith("backbone.body.")}
    other = retinanet(seed=5)
    initialise(other, model.state_dict(), keep_head=True)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    assert {
        model.layer_of(name) for name, _ in model.named_parameters() if not name.startswith("backbone")
    } == {model.num_layers}
