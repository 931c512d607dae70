"""RetinaNet: its losses against torchvision's parts put together by mmdet's rules, and what it finds."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import box_iou, sigmoid_focal_loss

from dattrain.errors import UserError
from dattrain.models.dense import create_backbone, create_detector
from dattrain.models.dense.create_detector import outs
from dattrain.models.dense.detector import by_anchor, shapes_of
from dattrain.models.dense.retinanet import focal_loss

CLASSES = 3
SIZES = [(96, 96), (60, 70)]  # the second is 64 x 96 where it is alone


def retinanet(seed: int = 0, **settings):
    torch.manual_seed(seed)
    backbone = create_backbone("dat_atto", img_size=64, outs=outs("retinanet"), **settings)
    return create_detector(backbone, "retinanet", CLASSES, channels=32)


def objects(*rows: tuple[float, ...]) -> dict[str, torch.Tensor]:
    """Of rows x1, y1, x2, y2, class."""
    values = torch.tensor([row[:4] for row in rows], dtype=torch.float32).view(-1, 4)
    return {"boxes": values, "labels": torch.tensor([row[4] for row in rows], dtype=torch.int64)}


FIRST = objects((10, 10, 40, 50, 0), (50, 50, 90, 80, 2), (12, 8, 44, 48, 1))
SECOND = objects((4, 30, 68, 60, 1), (1, 1, 5, 6, 2))


def images(count: int = 2, size: tuple[int, int] = (96, 96)) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def total(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(losses.values())).sum()


def slowly(model, x, sizes, targets) -> dict[str, torch.Tensor]:
    """The losses by loops, from torchvision's matcher, coder and focal loss."""
    levels = model.neck(model.backbone(x))
    logits, deltas = (torch.cat(by_anchor(each, n), 1) for each, n in zip(model.head(levels), (CLASSES, 4)))
    anchors = torch.cat(model.anchors(shapes_of(levels), x.device))
    focal, distance, positives = torch.zeros(()), torch.zeros(()), 0
    for image, one in enumerate(targets):
        if one is None:
            continue
        valid = model.anchors.valid(shapes_of(levels), sizes[image], x.device)
        references, truth = anchors[valid], torch.zeros(int(valid.sum()), CLASSES)
        matched = torch.full((len(references),), -1)
        if len(one["boxes"]):
            iou = box_iou(one["boxes"], references)
            matched = Matcher(0.5, 0.4)(iou)
            for box, of_box in enumerate(iou):
                matched[of_box == of_box.max()] = box
        own = matched >= 0
        truth[own.nonzero()[:, 0], one["labels"][matched[own]]] = 1
        focal = focal + sigmoid_focal_loss(logits[image][valid], truth, 0.25, 2.0)[matched > -2].sum()
        wanted = BoxCoder((1.0,) * 4).encode_single(one["boxes"][matched[own]], references[own])
        distance = distance + (deltas[image][valid][own] - wanted).abs().sum()
        positives += max(1, int(own.sum()))
    return {"loss_cls": focal / max(positives, 1), "loss_bbox": distance / max(positives, 1)}


@pytest.mark.parametrize("targets", [(FIRST, SECOND), (FIRST, objects()), (None, SECOND)])
def test_losses_and_gradients_are_those_of_torchvision_s_parts(targets):
    model, x = retinanet().train(), images()
    nn.init.normal_(model.head.classes.bias)  # scores of all heights, which the prior would not have
    found, wanted = model(x, SIZES, targets), slowly(model, x, SIZES, targets)
    assert list(found) == ["loss_cls", "loss_bbox"]
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)
        parameters = list(model.head.parameters())
        pairs = zip(*(torch.autograd.grad(each[name], parameters, retain_graph=True, allow_unused=True) for each in (found, wanted)))  # fmt: skip
        for ours, theirs in pairs:
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_focal_loss_of_large_logits_is_finite():
    logits = (
        torch.tensor([200.0, -200.0, 0.0, 60.0]).view(1, 4, 1, 1).requires_grad_()
    )  # 2 anchors, 2 classes
    loss = focal_loss(logits, torch.tensor([[0, -1]]), torch.tensor([[1, 0]]))
    truth = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(loss, sigmoid_focal_loss(logits.view(2, 2), truth, 0.25, 2.0, reduction="sum"))
    loss.backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("targets", [(objects(), objects()), (None, None), (None, objects())])
def test_nothing_to_learn_from_has_finite_losses_and_gradients_everywhere(targets):
    model = retinanet().train()
    found = model(images(), SIZES, targets)
    total(found).backward()
    assert (found["loss_cls"] > 0) == any(target is not None for target in targets)
    assert found["loss_bbox"] == 0
    bad = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not bad


def test_a_bad_sample_has_no_part():
    model, x = retinanet().train(), images()
    first = model(x, SIZES, (FIRST, None))
    x[1] = 100.0
    for name, value in model(x, SIZES, (FIRST, None)).items():
        assert torch.equal(value, first[name])


def test_anchors_over_padding_have_no_part():
    """With a head that sees each place alone, so that padding reaches a loss by its own anchors only."""
    model, x = retinanet().train(), images(1, (64, 64))
    levels = model.neck(model.backbone(x))
    padded = [nn.functional.pad(each, (0, each.shape[3], 0, each.shape[2]), value=7.0) for each in levels]
    for conv in (each for each in model.head.modules() if isinstance(each, nn.Conv2d)):
        weight = torch.zeros_like(conv.weight)
        weight[..., 1, 1] = conv.weight.detach()[..., 1, 1] * 9
        conv.weight.data = weight
    target = [objects((0, 20, 64, 64, 1), (30, 40, 64, 64, 0))]
    noise = torch.zeros(1, 0)
    alone = model.losses(levels, [(64, 64)], target, noise)
    for name, value in model.losses(padded, [(64, 64)], target, noise).items():
        torch.testing.assert_close(value, alone[name])
    larger = model.losses(padded, [(128, 128)], target, noise)
    assert larger["loss_cls"] != alone["loss_cls"]


def test_which_anchors_are_valid_is_the_same_mirrored():
    """Of an image whose sides are whole strides: each place has a partner, as many on either side of the middle."""
    anchors, shapes = retinanet().anchors, [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    upright = anchors.valid(shapes, (64, 160), torch.device("cpu"))
    turned = anchors.valid([shape[::-1] for shape in shapes], (160, 64), torch.device("cpu"))
    counts = [9 * height * width for height, width in shapes]
    for (height, width), a, b in zip(shapes, upright.split(counts), turned.split(counts)):
        assert torch.equal(a.view(height, width, 9), b.view(width, height, 9).transpose(0, 1))
        rows = a.view(height, width, 9)[:, :, 0]
        assert torch.equal(rows[:, : int(rows[0].sum())], rows[:, : int(rows[0].sum())].flip(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_boxes_and_losses_are_fp32_under_autocast_and_with_half_weights(dtype):
    model, x, targets = retinanet().train(), images(), (FIRST, SECOND)
    whole = model(x, SIZES, targets)
    with torch.autocast("cpu", dtype):
        mixed = model(x, SIZES, targets)
        model.eval().score_threshold = 0.0
        (found, _) = model(x, SIZES)
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    half = model.train().to(dtype)(x.to(dtype), SIZES, targets)
    for losses in (mixed, half):
        for name, value in losses.items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, whole[name], rtol=0.02, atol=0)
    total(half).backward()
    (found, _) = model.eval()(x.to(dtype), SIZES)
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32


def test_what_is_dropped_is_what_the_noise_says():
    model, x = retinanet(drop_path_rate=0.5).train(), images()
    assert model.num_drop_path == model.backbone.num_drop_path == 10
    noise = torch.rand(2, 10, generator=torch.Generator().manual_seed(0))
    first, again = (model(x, SIZES, (FIRST, SECOND), noise)["loss_cls"] for _ in range(2))
    other = model(x, SIZES, (FIRST, SECOND), 1 - noise)["loss_cls"]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_wrong_calls_are_refused():
    model, x = retinanet().train(), images()
    for arguments, message in (
        ((SIZES[:1], (FIRST, SECOND)), "1 sizes for 2 images"),
        ((SIZES,), "training needs targets"),
        ((SIZES, (FIRST,)), "training needs targets"),
        ((SIZES, (FIRST, SECOND), torch.zeros(2, 9)), r"drop_path_noise is \(2, 9\), not \(2, 10\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(x, *arguments)
    with pytest.raises(UserError, match="head='yolo' is not known; choose one of retinanet, "):
        create_detector(model.backbone, "yolo", CLASSES)
    with pytest.raises(UserError, match="head='yolo'"):
        outs("yolo")
    with pytest.raises(ValueError, match="last three maps, not 4"):
        create_detector(create_backbone("dat_atto", img_size=64), "retinanet", CLASSES)


def test_no_wait_for_the_device_and_nothing_that_raises_in_deterministic_mode():
    """A number that Python reads, or a shape that depends on one, would wait for a GPU, and stop a count of memory without one."""
    names = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    model = retinanet().train()
    with Recorded():
        total(model(images(), SIZES, (FIRST, SECOND))).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert "convolution" in names
    assert not {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "is_nonzero", "equal"} & set(
        names
    )
    raising = ("_adaptive_", "adaptive_", "avg_pool3d", "max_unpool", "reflection_pad", "grid_sampler")
    assert not [name for name in names if name.startswith((*raising, "upsample_bicubic", "upsample_linear"))]


def test_channels_last_and_compiled_losses_are_the_same():
    model, x = retinanet().train(), images()
    whole = model(x, SIZES, (FIRST, SECOND))
    last = model.to(memory_format=torch.channels_last)(
        x.contiguous(memory_format=torch.channels_last), SIZES, (FIRST, SECOND)
    )
    graph = torch.compile(focal_loss, backend="aot_eager", fullgraph=True)
    logits = torch.randn(2, 9 * CLASSES, 4, 5, generator=torch.Generator().manual_seed(0))
    matched = torch.arange(-2, 358).view(2, 180) % 4 - 2
    for name, value in last.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        graph(logits, matched, matched.abs()), focal_loss(logits, matched, matched.abs())
    )


def pictures() -> torch.Tensor:
    """The objects of ``FIRST`` and ``SECOND`` in a colour of their class."""
    x = torch.zeros(2, 3, 64, 64)
    for image, (x1, y1, x2, y2, label) in (
        (0, (4, 6, 30, 40, 0)),
        (0, (34, 34, 62, 62, 2)),
        (1, (8, 16, 60, 50, 1)),
    ):
        x[image, label, y1:y2, x1:x2] = 2.0
    return x


def test_it_finds_what_it_was_shown():
    model, x = retinanet().train(), pictures()
    for tower in (
        model.head.class_tower,
        model.head.box_tower,
    ):  # mmdet's small weights take hundreds of steps to grow
        for conv in tower[::2]:
            nn.init.kaiming_normal_(conv.weight)
    sizes = [(64, 64), (64, 64)]
    targets = [objects((4, 6, 30, 40, 0), (34, 34, 62, 62, 2)), objects((8, 16, 60, 50, 1))]
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for _ in range(40):
        loss = total(model(x, sizes, targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().item())
    assert losses[-1] < 0.25 * losses[0]
    model.eval()
    found = model(x, sizes)
    model.max_detections = 1
    assert [len(each["boxes"]) for each in model(x, sizes)] == [1, 1]
    for one, truth in zip(found, targets):
        assert torch.equal(one["scores"], one["scores"].sort(descending=True).values)
        number = len(truth["boxes"])
        iou, index = box_iou(one["boxes"][:number], truth["boxes"]).max(1)
        assert sorted(index.tolist()) == list(range(number))
        assert (iou > 0.6).all()
        assert torch.equal(one["labels"][:number], truth["labels"][index])


def test_found_objects_are_over_the_threshold_inside_of_the_image_and_not_twice():
    model, x = retinanet().eval(), images()
    nn.init.normal_(model.head.classes.bias, -1)
    nn.init.normal_(model.head.boxes.weight, std=0.3)
    for one, (height, width) in zip(model(x, SIZES), SIZES):
        assert 0 < len(one["boxes"]) <= 100
        assert (one["scores"] > 0.05).all()
        assert ((one["boxes"] >= 0) & (one["boxes"] <= torch.tensor([width, height, width, height]))).all()
        assert (one["boxes"][:, 2:] > one["boxes"][:, :2]).all()
        for label in range(CLASSES):
            mine = one["boxes"][one["labels"] == label]
            assert (box_iou(mine, mine).triu(1) <= 0.5).all()
    model.score_threshold = 0.999
    assert [len(one["boxes"]) for one in model(x, SIZES)] == [0, 0]
    assert one["boxes"].shape[1] == 4


def test_protocol_of_the_engine():
    model = retinanet()
    layers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert layers["backbone.body.patch_embed.proj.weight"] == 0
    after = {name for name, layer in layers.items() if layer == model.num_layers == 6}
    assert after == {name for name in layers if name.startswith(("neck.", "head.", "backbone.norms."))}
    assert model.no_weight_decay() == {name for name in layers if "bias_table" in name}
    with pytest.raises(ValueError, match="is not a parameter of RetinaNet"):
        model.layer_of("rpn.weight")
    classifier = {id(parameter) for parameter in model.get_classifier().parameters()}
    assert classifier == {id(parameter) for name, parameter in model.named_parameters() if name in after}
    model.set_grad_checkpointing(True, mode="stage")
    assert model.backbone.body.checkpoint_stages
    assert not model.has_masks
