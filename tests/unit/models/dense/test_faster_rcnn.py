"""Faster, Mask and Cascade R-CNN: losses against a slow reference, empty and bad images, precision, stages, and learning by heart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import log

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import (
    batched_nms,
    box_iou,
    clip_boxes_to_image,
    generalized_box_iou_loss,
    masks_to_boxes,
    roi_align,
)

from dattrain.models.dense import create_backbone, create_detector, faster_rcnn
from dattrain.models.dense.faster_rcnn import FasterRCNN
from dattrain.models.dense.mask_targets import mask_targets
from dattrain.models.dense.rcnn import BoxHead, MaskHead
from dattrain.models.dense.regions import CASCADE, Stage, pick, refine
from dattrain.models.dense.rpn import inside_of, propose, rpn_losses
from dattrain.models.dense.sampling import key_of, sample

CLASSES, BRANCHES = 5, 10
UPDATES = 36
HEADS = ("faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn")


@cache
def drawn(head: str, norm: str = "group") -> FasterRCNN:
    torch.manual_seed(0)
    model = create_detector(
        create_backbone("dat_atto", img_size=64, drop_path_rate=0.2), head, CLASSES, norm=norm, channels=32
    )
    assert isinstance(model, FasterRCNN)
    # Fresh box layers move nothing; here regions shall move, and scores differ.
    with torch.no_grad():
        for box_head in model.box_heads:
            box_head.boxes.weight.normal_(std=0.05)
            box_head.classes.weight.normal_(std=0.05)
        model.rpn.boxes.weight.normal_(std=0.05)
    return model


def detector(head: str, norm: str = "group") -> FasterRCNN:
    """In training mode, with the same weights each time and without gradients."""
    model = drawn(head, norm).train()
    model.zero_grad(set_to_none=True)
    model.score_threshold, model.max_detections = 0.05, 100
    return model


def some(batch: int = 2, height: int = 96, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, height, width, generator=generator)
    return x, torch.rand(batch, BRANCHES + 4, generator=generator)


def target(*boxes: tuple[float, ...], labels: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """Objects that cover the left three quarters of their boxes."""
    masks = torch.zeros(len(boxes), 56, 56, dtype=torch.uint8)
    masks[:, :, :42] = 255
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "masks": masks,
    }


TWO = target((4, 5, 40, 50), (10.5, 52, 31, 88.25), labels=(1, 4))
THREE = target(
    (4, 5, 40, 50), (10.5, 52, 31, 88.25), (50, 80, 56, 85), labels=(1, 4, 1)
)  # which no anchor is near
ONE = target((20, 8, 59, 70), labels=(0,))
SMALL = target((4, 5, 24, 30), labels=(2,))
NONE = target()
SIZES = [(96, 64), (88, 60)]
SMALL_SIZES = [(48, 48), (48, 46)]


def assign(boxes, truth, positive, negative, minimum, low_quality):
    """mmdet's MaxIoUAssigner, a box at a time."""
    matched = []
    overlaps = box_iou(boxes, truth) if len(truth) else torch.zeros(len(boxes), 1)
    for row in overlaps:
        best = float(row.max())
        matched.append(int(row.argmax()) if best >= positive else -1 if best < negative else -2)
    for number in range(len(truth) if low_quality else 0):
        best = overlaps[:, number].max()
        if best >= minimum:
            for place in (overlaps[:, number] == best).nonzero()[:, 0].tolist():
                matched[place] = number
    return torch.tensor(matched)


def reference(model, x, sizes, targets, noise):
    """The losses, image by image and box by box, on torchvision's coder, suppression and RoIAlign."""
    cascade = len(model.stages) > 1
    keys = key_of(noise[:, BRANCHES:])
    levels = model.neck(model.backbone(x, noise[:, :BRANCHES]))
    logits, deltas = model.rpn(levels)
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    cls, box, counted, proposals = [], [], 0, []
    for image, (size, objects) in enumerate(zip(sizes, targets)):
        anchors, flat_logits, flat_deltas, ids, best = [], [], [], [], []
        for level, stride in enumerate((4, 8, 16, 32, 64)):
            height, width = levels[level].shape[2:]
            number = 0
            for row in range(height):
                for column in range(width):
                    for kind, ratio in enumerate((0.5, 1.0, 2.0)):
                        w, h = 8 * stride / ratio**0.5, 8 * stride * ratio**0.5
                        x0, y0 = column * stride, row * stride
                        anchors.append((x0 - w / 2, y0 - h / 2, x0 + w / 2, y0 + h / 2))
                        flat_logits.append(logits[level][image, kind, row, column])
                        flat_deltas.append(deltas[level][image, 4 * kind : 4 * kind + 4, row, column])
                        ids.append(level)
                        number += 1
            of_level = torch.stack(flat_logits[-number:])
            first = len(flat_logits) - number
            best += (first + of_level.argsort(descending=True)[:2000]).tolist()
        anchors, ids = torch.tensor(anchors), torch.tensor(ids)
        flat_logits, flat_deltas = torch.stack(flat_logits), torch.stack(flat_deltas)
        boxes = clip_boxes_to_image(coder.decode_single(flat_deltas.detach(), anchors), size)[best]
        scores, of = flat_logits.detach()[best], ids[best]
        there = ((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])).nonzero()[:, 0]
        kept = batched_nms(boxes[there], scores[there], of[there], 0.7)[: 2000 if cascade else 1000]
        proposals.append(boxes[there][kept])

        inside = torch.tensor([
            bool(x0 >= 0 and y0 >= 0 and x1 < size[1] and y1 < size[0]) or not cascade
            for x0, y0, x1, y1 in anchors.tolist()
        ])  # fmt: skip
        matched = torch.full((len(anchors),), -2)
        matched[inside] = assign(anchors[inside], objects["boxes"], 0.7, 0.3, 0.3, True)
        positive, negative = sample(matched, keys[image, 0], total=256, positive_share=0.5)
        counted += max(1, len(positive)) + max(1, len(negative))
        for index in positive.tolist():
            cls.append(F.softplus(-flat_logits[index]))
            wanted = coder.encode_single(objects["boxes"][matched[index]][None], anchors[index][None])[0]
            difference = (flat_deltas[index] - wanted).abs()
            smooth = torch.where(difference < 1 / 9, 4.5 * difference**2, difference - 1 / 18)
            box.append((smooth if cascade else difference).sum())
        cls += [F.softplus(flat_logits[index]) for index in negative.tolist()]
    losses = {"loss_rpn_cls": sum(cls) / counted, "loss_rpn_bbox": sum(box) / counted}

    for number, stage in enumerate(model.stages):
        coder = BoxCoder(tuple(1 / std for std in stage.stds))
        rows = []
        for image, objects in enumerate(targets):
            truth = objects["boxes"]
            matched = assign(proposals[image], truth, *(stage.iou,) * 3, stage.low_quality)
            matched = torch.cat([torch.arange(len(truth)), matched])
            candidates = torch.cat([truth, proposals[image]])
            positive, negative = sample(matched, keys[image, 1 + number], total=512, positive_share=0.25)
            rows += [(image, candidates[i], int(matched[i]), i < len(truth)) for i in positive.tolist()]
            rows += [(image, candidates[i], None, False) for i in negative.tolist()]
        cls, box, mask, after = [], [], [], [[] for _ in targets]
        pooled = {
            size: torch.cat([pool(levels, image, region, size) for image, region, _, _ in rows])
            for size in ((7, 14) if model.has_masks else (7,))
        }
        scores, shifts = model.box_heads[number](pooled[7])
        for row, (image, region, match, is_truth) in enumerate(rows):
            label = CLASSES if match is None else int(targets[image]["labels"][match])
            cls.append(-scores[row].log_softmax(0)[label])
            moving = int(scores[row, :CLASSES].argmax()) if match is None else label
            shift = shifts[row, 4 * moving : 4 * moving + 4]
            moved = coder.decode_single(shift[None], region[None])
            if not is_truth:
                after[image].append(clip_boxes_to_image(moved.detach(), sizes[image])[0])
            if match is None:
                continue
            truth = targets[image]["boxes"][match][None]
            if cascade:
                box.append(10 * generalized_box_iou_loss(moved, truth).sum())
            else:
                box.append((shift - coder.encode_single(truth, region[None])[0]).abs().sum())
            if model.has_masks:
                found = model.mask_heads[number](pooled[14][row : row + 1])[0, label]
                wanted = mask_targets(
                    targets[image]["masks"], targets[image]["boxes"], torch.tensor([match]), region[None]
                )
                mask.append(F.binary_cross_entropy_with_logits(found, wanted[0]))
        losses[f"{stage.prefix}loss_cls"] = stage.weight * sum(cls) / len(rows)
        losses[f"{stage.prefix}loss_bbox"] = stage.weight * sum(box) / len(rows)
        if model.has_masks:
            losses[f"{stage.prefix}loss_mask"] = stage.weight * sum(mask) / len(mask)
        proposals = [torch.stack(each) for each in after]
    return losses


def pool(levels, image, region, size):
    width, height = region[2] - region[0], region[3] - region[1]
    level = min(max(int(torch.log2((width * height) ** 0.5 / 56 + 1e-6).floor()), 0), 3)
    numbered = torch.cat([torch.tensor([float(image)]), region])[None]
    return roi_align(levels[level], numbered, size, 1 / 4 / 2**level, 0, True)


@pytest.mark.parametrize("head", ["mask_rcnn", "cascade_mask_rcnn"])
def test_losses_are_those_of_a_slow_reference(head):
    model = detector(head)
    x, noise = some()
    noise = noise[:, : model.num_drop_path]
    with torch.no_grad():
        found = model(x, SIZES, [THREE, ONE], noise)
        expected = reference(model, x, SIZES, [THREE, ONE], noise)
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=1e-5, msg=name)
        assert found[name].dtype == torch.float32 and found[name].dim() == 0


def test_anchors_are_counted_as_mmdet_counts_them():
    """Of each image at least one positive and one negative: 1 + 3 where there is no box, 2 + 1 where all anchors are of one."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 11], [0, 0, 11, 10]])
    everywhere, nowhere = torch.ones(3).bool(), torch.zeros(3).bool()
    two = torch.tensor([True, True, False])
    logits, deltas = torch.zeros(3, 3), torch.ones(3, 3, 4)
    cls, box = rpn_losses(
        logits,
        deltas,
        anchors,
        [everywhere, two, nowhere],
        [anchors[:0], anchors[:1], None],
        torch.zeros(3, dtype=torch.int64),
        beta=0.0,
    )
    assert float(cls) == pytest.approx(5 * log(2) / 7)
    of_second = torch.tensor([0, -0.5 / 11, 0, log(10 / 11)])
    assert float(box) == pytest.approx(float((4 + (1 - of_second).abs().sum()) / 7))


def test_settings_that_only_large_images_show(monkeypatch):
    """As mmdet's files have them: 2,000 anchors a level, proposals, and whether a box has its best regions anyway."""
    given = []
    monkeypatch.setattr(faster_rcnn, "propose", lambda *_, **more: given.append(more) or torch.zeros(0, 4))
    for head, proposals in zip(HEADS, (1000, 1000, 2000, 2000)):
        model = detector(head)
        x, noise = some(1, 48, 48)
        with torch.no_grad():
            model(x, SMALL_SIZES[:1], [SMALL], noise[:, : model.num_drop_path])
        assert given.pop() == {"per_level": 2000, "total": proposals}
        assert {stage.low_quality for stage in model.stages} == {head == "mask_rcnn"}


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[str]]:
    """Modules with weights of their own, in the order in which they run: what ZeRO-3's ranks gather together."""
    names: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: names.append(name))
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    yield names
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("head", HEADS)
def test_micro_batches_of_nothing(head, monkeypatch):
    """Without boxes, with bad samples, of bad samples alone: the same losses and modules, all finite, all with gradients."""
    model = detector(head)
    x, noise = some(2, 48, 48)
    noise = noise[:, : model.num_drop_path]
    regions = []
    for kind in (BoxHead, MaskHead):
        run = kind.forward
        monkeypatch.setattr(
            kind, "forward", lambda self, pooled, run=run: regions.append(len(pooled)) or run(self, pooled)
        )
    with recorded(model) as calls:
        full = model(x, SMALL_SIZES, [SMALL, NONE], noise)
    assert [name for name in calls if "heads" in name]
    for targets in ([NONE, NONE], [None, NONE], [None, None]):
        model.zero_grad(set_to_none=True)
        with recorded(model) as again:
            losses = model(x, SMALL_SIZES, targets, noise)
        assert again == calls and list(losses) == list(full)
        sum(losses.values()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        for name, value in losses.items():
            assert bool(value.isfinite()), name
            learns = name.endswith("_cls") and targets != [None, None]
            assert (float(value.detach()) > 0) == learns, name
    # Normalisation over devices, and kernels of convolutions, are spared a batch of nothing.
    assert min(regions) == 1
    # A bad sample is as if it were not there, whatever its pixels are.
    with torch.no_grad():
        beside = model(x, SMALL_SIZES, [SMALL, None], noise)
        alone = model(x[:1], SMALL_SIZES[:1], [SMALL], noise[:1])
    for name, value in alone.items():
        torch.testing.assert_close(beside[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_diverged_network_does_not_crash():
    model = detector("cascade_mask_rcnn")
    x, noise = some(2, 48, 48)
    x = torch.stack([x[0], torch.full_like(x[1], float("nan"))])
    with torch.no_grad():
        losses = model(x, SMALL_SIZES, [SMALL, SMALL], noise)
        assert not bool(torch.stack(list(losses.values())).sum().isfinite())
        _, found = model.eval()(x, SMALL_SIZES)
    assert len(found["boxes"]) == 0 and tuple(found["masks"].shape) == (0, 28, 28)


def test_batch_norm_of_no_regions():
    """A stand-in is normalised, for the gradients' sake, but leaves no trace in the running averages."""
    model = detector("cascade_rcnn", norm="batch")
    x, noise = some(2, 48, 48)
    names = [name for name, _ in model.named_buffers() if "running" in name]
    assert len(names) == 3 * 4 * 2

    def averages() -> list[torch.Tensor]:
        return [model.get_buffer(name).clone() for name in names]

    before = averages()
    losses = model(x, SMALL_SIZES, [None, None], noise)
    sum(losses.values()).backward()
    assert all(bool(value == 0) for value in losses.values())
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert all(torch.equal(*each) for each in zip(before, averages()))
    model(x, SMALL_SIZES, [SMALL, None], noise)
    assert not any(torch.equal(*each) for each in zip(before, averages()))
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
    assert all(bool(each.isfinite().all()) for each in averages())


def test_random_choices_are_functions_of_the_noise(monkeypatch):
    """A column for each sampler: what follows it changes with it, and what comes before does not."""
    model = detector("mask_rcnn")
    x, noise = some(1, 128, 128)
    noise, arguments = noise[:, : model.num_drop_path], ([(128, 128)], [TWO])
    assert model.num_drop_path == BRANCHES + 2
    with torch.no_grad():
        first = model(x, *arguments, noise)
        assert first == model(x, *arguments, noise)
        for column, changed in enumerate(("loss_rpn_cls", "loss_cls")):
            other = noise.clone()
            other[:, BRANCHES + column] = 1 - other[:, BRANCHES + column]
            again = model(x, *arguments, other)
            assert again[changed] != first[changed]
            names = list(first)
            assert all(again[name] == first[name] for name in names[: names.index(changed)])

    # Stages of a cascade have a column each; the later ones seldom have more than 512 regions to choose from.
    keys = []
    monkeypatch.setattr(faster_rcnn, "pick", lambda *given: keys.append(given[2]) or pick(*given))
    model = detector("cascade_rcnn")
    x, noise = some(2, 48, 48)
    assert model.num_drop_path == BRANCHES + 4
    model(x, SMALL_SIZES, [SMALL, NONE], noise)
    assert torch.equal(torch.stack(keys, 1), key_of(noise[:, BRANCHES + 1 :]))


def test_an_image_s_regions_are_the_same_in_any_batch():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(900, 2, generator=generator) * 40
    proposals = [torch.cat([corners, corners + 8 + 20 * torch.rand(900, 2, generator=generator)], 1)] * 3
    keys = key_of(torch.tensor([0.3, 0.3, 0.6]))
    found = pick(proposals, [TWO, None, ONE], keys, Stage(), CLASSES)
    alone = pick(proposals[2:], [ONE], keys[2:], Stage(), CLASSES)
    of_image = found.boxes[:, 0] == 2
    assert torch.equal(found.boxes[of_image, 1:], alone.boxes[:, 1:])
    assert torch.equal(found.labels[of_image], alone.labels)
    assert set(found.boxes[:, 0].tolist()) == {0.0, 2.0} and len(found) == 2 * 512
    # Boxes are numbered over the images that have a part: two of the first, one of the last.
    assert set(found.objects[of_image].tolist()) == {-1, 2}
    assert set(found.objects[~of_image].tolist()) == {-1, 0, 1}
    assert torch.equal(found.objects >= 0, found.labels < CLASSES)
    assert int((found.objects >= 0)[of_image].sum()) <= 128
    assert found.boxes[found.truths, 1:].tolist() == [*TWO["boxes"].tolist(), *ONE["boxes"].tolist()]
    swapped = pick(proposals[:1], [TWO], keys[2:], Stage(), CLASSES)
    assert not torch.equal(swapped.boxes[:, 1:], found.boxes[~of_image, 1:])


def test_stages_of_a_cascade_are_stricter_and_refined():
    assert [stage.iou for stage in CASCADE] == [0.5, 0.6, 0.7]
    assert [stage.weight for stage in CASCADE] == [1.0, 0.5, 0.25]
    boxes = torch.tensor([[1, 10, 10, 30, 30], [0, 10, 10, 30, 30], [0, 10, 10, 30, 30.0]])
    deltas = torch.zeros(3, CLASSES * 4)
    deltas[0, 4:8] = torch.tensor([5.0, 0, 0, 0])  # of class 1: half a width to the right, where std is .1
    deltas[1, 8:12] = torch.tensor([-10.0, 0, 10, 0])  # of class 2: a width to the left, wider by exp(2)
    moved = refine(boxes, torch.tensor([1, 2, 0]), deltas, CASCADE[0].stds, [(64, 64), (64, 36)])
    wide = 10 * torch.tensor(2.0).exp()
    assert moved[0].tolist() == [1, 20, 10, 36, 30]
    torch.testing.assert_close(moved[1], torch.tensor([0.0, 0, 10, wide.clamp(max=64), 30]))
    assert torch.equal(moved[2], boxes[2])
    truth = {"boxes": boxes[:1, 1:], "labels": torch.tensor([3])}
    for shift, positives in ((0.0, 3), (5.5, 2), (7.0, 1), (8.0, 1)):  # of 20: IoU 1, .57, .48, .43
        proposal = boxes[:1, 1:] + torch.tensor([shift, 0, shift, 0])
        counts = [
            int((pick([proposal], [truth], key_of(torch.rand(1)), s, CLASSES).objects >= 0).sum()) - 1
            for s in CASCADE
        ]
        assert sum(counts) == positives - 1 + (shift == 0), (shift, counts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pure", [False, True])
def test_half_precision(dtype, pure):
    head, side = (
        ("cascade_mask_rcnn", 64) if dtype == torch.bfloat16 else ("mask_rcnn", 32)
    )  # fp16 is slow on CPUs
    model = detector(head)
    x, noise = some(1, side, side)
    noise, sizes = noise[:, : model.num_drop_path], [(side, side - 2)]
    targets = [SMALL]
    with torch.no_grad():
        exact = model(x, sizes, targets, noise)
    if pure:
        model, x = drawn.__wrapped__(head).train().to(dtype), x.to(dtype)
    with torch.autocast("cpu", dtype, enabled=not pure):
        losses = model(x, sizes, targets, noise)
    sum(losses.values()).backward()
    for name, value in losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.detach(), exact[name], rtol=0.15, atol=0.02, msg=name)
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=not pure):
        (found,) = model.eval()(x, sizes)
    assert {each.dtype for name, each in found.items() if name != "labels"} == {torch.float32}


@pytest.mark.parametrize("head", ["mask_rcnn", "cascade_mask_rcnn"])
def test_what_is_found_is_what_torchvision_s_parts_find(head):
    model = detector(head).eval()
    x, _ = some()
    model.score_threshold, model.max_detections = 0.15, 30
    with torch.no_grad():
        found = model(x, SIZES)
        levels = model.neck(model.backbone(x))
        logits, deltas, anchors = model._anchors(levels)
        for image, (size, of_image) in enumerate(zip(SIZES, found)):
            regions = propose(
                [each[image] for each in logits], [each[image] for each in deltas], anchors, size
            )
            assert 100 < len(regions) <= 1000
            total = 0
            for number, stage in enumerate(model.stages):
                coder = BoxCoder(tuple(1 / std for std in stage.stds))
                pooled = torch.cat([pool(levels, image, region, 7) for region in regions])
                scores, shifts = model.box_heads[number](pooled)
                total = total + scores
                boxes = clip_boxes_to_image(coder.decode(shifts, [regions]), size)
                if number + 1 < len(model.stages):
                    regions = boxes[torch.arange(len(boxes)), scores[:, :-1].argmax(1)]
            scores = (total / len(model.stages)).softmax(1)[:, :-1]
            row, label = (scores > 0.15).nonzero(as_tuple=True)
            kept = batched_nms(boxes[row, label], scores[row, label], label, 0.5)[:30]
            torch.testing.assert_close(of_image["boxes"], boxes[row, label][kept], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(of_image["scores"], scores[row, label][kept], rtol=1e-3, atol=1e-4)
            assert torch.equal(of_image["labels"], label[kept])
            assert 0 < len(kept) <= 30
            masks = []
            for box, kind in zip(of_image["boxes"], of_image["labels"]):
                pooled = pool(levels, image, box, 14)
                each = [mask_head(pooled)[0, kind].sigmoid() for mask_head in model.mask_heads]
                masks.append(torch.stack(each).mean(0))
            torch.testing.assert_close(of_image["masks"], torch.stack(masks), rtol=1e-3, atol=1e-4)
        model.score_threshold = 1.0
        with recorded(model) as without:
            assert [len(each["boxes"]) for each in model(x, SIZES)] == [0, 0]
        model.score_threshold = 0.0
        with recorded(model) as calls:
            model(x, SIZES)
        assert without == calls


def test_proposals_are_inside_and_not_empty():
    anchors = [torch.tensor([[-8.0, -8, 8, 8], [20, 20, 60, 60], [70, 2, 90, 9], [20.5, 20, 60, 60]])]
    logits = [torch.tensor([0.1, 0.2, 9.0, 0.3])]
    found = propose(logits, [torch.zeros(4, 4)], anchors, (48, 64))
    assert found.tolist() == [[20.5, 20, 60, 48], [0, 0, 8, 8]]
    found = propose(logits, [torch.zeros(4, 4)], anchors, (48, 64), per_level=2)
    assert found.tolist() == [[20.5, 20, 60, 48]]
    assert inside_of(anchors[0], (61, 61)).tolist() == [False, True, False, True]
    assert inside_of(anchors[0], (60, 61)).tolist() == [False] * 4


def test_only_logits_of_the_own_class_are_trained():
    model = detector("mask_rcnn")
    x, noise = some(2, 48, 48)
    model(x, SMALL_SIZES, [SMALL, None], noise[:, : model.num_drop_path])["loss_mask"].backward()
    rows = model.mask_heads[0].masks.weight.grad.abs().sum((1, 2, 3)) > 0
    assert rows.tolist() == [False, False, True, False, False]


def shapes() -> tuple[torch.Tensor, list[dict[str, torch.Tensor]], list[torch.Tensor]]:
    """A disc and a square, and a triangle: images, targets, and bitmaps."""
    y, x = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    disc = ((x - 20) / 14) ** 2 + ((y - 24) / 18) ** 2 <= 1
    square = (x > 36) & (x < 60) & (y > 30) & (y < 60)
    triangle = (x > 8) & (x < 56) & (y > 8) & (y < 56) & (x > y)
    images = torch.full((2, 3, 64, 64), -0.5)
    images[0, 0][disc], images[0, 1][square], images[1, 2][triangle] = 2.0, 2.0, 2.0
    targets, bitmaps = [], [torch.stack([disc, square]), triangle[None]]
    for masks, labels in zip(bitmaps, ((0, 1), (2,))):
        boxes = masks_to_boxes(masks) + torch.tensor([0.0, 0.0, 1.0, 1.0])
        over = torch.cat([torch.arange(len(boxes))[:, None], boxes], 1)
        grids = roi_align(masks[:, None].float(), over, 56, 1.0, 4, True)[:, 0]
        targets.append(
            {"boxes": boxes, "labels": torch.tensor(labels), "masks": (grids * 255).to(torch.uint8)}
        )
    return images, targets, bitmaps


def test_mask_rcnn_learns_two_images_by_heart():
    images, targets, bitmaps = shapes()
    torch.manual_seed(0)
    model = create_detector(create_backbone("dat_atto", img_size=64), "mask_rcnn", 3, channels=32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    for step in range(UPDATES):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 5) * (0.3 if step > 0.7 * UPDATES else 1)
        optimizer.zero_grad()
        sum(model(images, [(64, 64)] * 2, targets).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    with torch.no_grad():
        found = model.eval()(images, [(64, 64)] * 2)
    for of_image, truth, masks in zip(found, targets, bitmaps):
        assert set(of_image["labels"][of_image["scores"] > 0.5].tolist()) == set(truth["labels"].tolist())
        for label, true_box, bitmap in zip(truth["labels"], truth["boxes"], masks):
            best = (of_image["labels"] == label).nonzero()[0]
            box, mask = of_image["boxes"][best], of_image["masks"][best]
            assert float(box_iou(box, true_box[None])) > 0.6
            region = F.pad(box, (1, 0))
            wanted = roi_align(bitmap[None, None].float(), region, 28, 1.0, 0, True)[:, 0] >= 0.5
            overlap = ((mask > 0.5) & wanted).sum() / ((mask > 0.5) | wanted).sum()
            assert float(overlap) > 0.6
