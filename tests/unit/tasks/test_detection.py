"""Detection's loss, weights and settings."""

from dataclasses import replace
from pathlib import Path

import objects
import pytest
import scenes
import torch
import yaml
from host_waits import fake_cuda

from dattrain.config.load import loads
from dattrain.data.classes import Classes
from dattrain.data.detection_batch import GRID
from dattrain.engine import memory
from dattrain.engine.memory import Ledger
from dattrain.errors import ConfigError, UserError
from dattrain.models import zoo
from dattrain.models.dense.rcnn import BoxHead, MaskHead
from dattrain.tasks import coco_numbers, detection
from dattrain.tasks.create import create_task
from dattrain.tasks.detection import Detection
from dattrain.tasks.segmentation import Segmentation

CPU = torch.device("cpu")
HEADS = ("retinanet", "mask_rcnn")


def recipe(*overrides, head="retinanet"):
    return loads(yaml.safe_dump(objects.recipe_of(head)), ["task.channels=16", *overrides]).config


def test_the_loss_is_the_sum_of_the_heads_and_bad_samples_have_no_part_in_it():
    task = Detection(recipe(head="mask_rcnn"))
    batch = task.example(3, 64, CPU)
    key = batch.keys[1]
    batch = replace(batch, bad=((key, "cut short"),), weight=torch.tensor([1.0, 0.0, 1.0]), counts=(8, 0, 16))
    given = {}

    def forward(x, sizes, targets, drop_path_noise):
        given.update(x=x, sizes=sizes, targets=targets, noise=drop_path_noise)
        return {"loss_cls": torch.tensor(0.5, requires_grad=True), "loss_bbox": torch.tensor(0.25)}

    noise = torch.rand(3, 4)
    loss = task.loss(forward, batch, noise=noise, dtype=torch.float32)
    assert loss.value.item() == 0.75 and loss.value.requires_grad
    assert (float(loss.total), float(loss.weight)) == (1.5, 2.0) and loss.total.dtype == torch.float64
    assert {name: float(x) for name, x in loss.parts.items()} == {"loss_cls": 1.0, "loss_bbox": 0.5}
    first, bad, last = given["targets"]
    assert bad is None and given["noise"] is noise and given["sizes"] == [(64, 96)] * 3
    assert torch.equal(first["boxes"], batch.boxes[:8]) and torch.equal(last["masks"], batch.masks[8:])
    assert torch.equal(last["labels"], batch.labels[8:]) and first["masks"].shape == (8, GRID, GRID)
    mean = (batch.images.float() / 255).mean() - torch.tensor(task.config.augment.mean).mean()
    assert abs(float(given["x"].mean()) * 0.226 - float(mean)) < 0.02, "normalised"


def test_losses_that_are_not_finite_are_so_in_all_sums():
    task = Detection(recipe())
    for bad in (float("nan"), float("inf")):
        loss = task.loss(
            lambda *args, bad=bad: {"loss_cls": torch.tensor(bad)},
            replace(task.example(2, 64, CPU), weight=torch.zeros(2)),
            noise=None, dtype=torch.float32,
        )  # fmt: skip
        assert not torch.isfinite(loss.total)


@pytest.mark.parametrize("head", HEADS)
def test_an_example_is_what_a_loader_gives(head):
    task = Detection(recipe("geometry.crop=[64,96]", head=head))
    made = task.example(2, 64, CPU, first=6)
    assert made.images.shape == (2, 3, 64, 96) and made.images.dtype == torch.uint8
    assert made.position.tolist() == [6, 7] and sum(made.counts) == len(made.boxes) == len(made.masks)
    assert made.masks.shape[1:] == ((GRID, GRID) if head == "mask_rcnn" else (0, 0))
    low, high = made.boxes.split(2, 1)
    assert (low >= 0).all() and (high - low > 5).all() and (high <= torch.tensor([96.0, 64.0])).all()
    model = task.build(64).train()
    loss = task.loss(model, made, noise=torch.rand(2, task.noise_width(model)), dtype=torch.float32)
    loss.value.backward()
    assert torch.isfinite(loss.value) and all(p.grad is not None for p in model.parameters())
    assert float(sum(loss.parts.values())) == pytest.approx(float(loss.total), rel=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_what_is_drawn_comes_from_the_noise(head):
    task = Detection(recipe(head=head))
    model, batch = task.build(64).train(), task.example(2, 64, CPU)
    noise = torch.rand(2, task.noise_width(model))
    losses = []
    for seed, each in ((0, noise), (1, noise), (1, 1 - noise)):
        torch.manual_seed(seed)
        losses.append(float(task.loss(model, batch, noise=each, dtype=torch.float32).total))
    assert losses[0] == losses[1] != losses[2]
    samplers = 2 if head == "mask_rcnn" else 0
    still = Detection(recipe("model.drop_path=0", head=head))
    assert still.noise_width(still.build(64)) == (model.num_drop_path if samplers else 0)
    assert model.num_drop_path - model.backbone.num_drop_path == samplers


def test_a_micro_batch_never_waits_for_the_device():
    """The network does, where it picks by value; what the task does around it does not."""
    task = Detection(recipe(head="mask_rcnn"))
    made = task.example(2, 64, CPU, dtype=torch.float32)
    with fake_cuda() as waits:
        images, boxes, labels, masks, weight = (
            torch.empty_like(x, device="cuda") for x in made.device_tensors
        )
        made = replace(made, images=images, boxes=boxes, labels=labels, masks=masks, weight=weight)
        loss = task.loss(
            lambda x, *args: {"loss_cls": x.sum(), "loss_bbox": x.sum()},
            made,
            noise=None,
            dtype=torch.float32,
        )
    assert loss.value.device.type == "cuda" and not waits.found, waits.report()


@pytest.mark.parametrize("head", HEADS)
def test_memory_of_a_step_is_found_without_a_device(head):
    config = recipe("geometry.crop=[128,192]", "task.channels=32", head=head)
    task = create_task(config)
    model = task.build(64)
    found = memory.activations(model, config, micro_batch=2, device="cpu")
    batch = task.example(2, 64, CPU, dtype=torch.float32)
    model.train()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(memory.drop)
    with Ledger([*model.parameters(), *model.buffers(), *batch.device_tensors]) as ledger:
        loss = task.loss(model, batch, noise=None, dtype=torch.float32).value
        kept = ledger.current
        loss.backward()
    print(
        f"{head}: kept {found.kept / 1e6:.1f} of {kept / 1e6:.1f} MB, peak {found.peak / 1e6:.1f} of {ledger.peak / 1e6:.1f}"
    )
    # Of the R-CNNs it is that of the most regions, and small images of few objects have fewer.
    most = 2.2 if head == "mask_rcnn" else 1.35
    assert 0.75 < found.kept / kept < most and 0.75 < found.peak / ledger.peak < most


def names(*own):
    return Classes(len(own), own, "here")


@pytest.mark.parametrize("head", HEADS)
def test_weights_of_other_tasks_go_into_the_backbone(head):
    task = Detection(recipe(head=head))
    model = task.build(64)
    source = zoo.create("dat_atto", num_classes=7, img_size=64)
    said = task.initialise(model, source.state_dict(), Path("somewhere"), names("box", "bar", "disc"))
    assert "pyramid and heads are new" in said and "head.fc.weight" in said
    assert torch.equal(model.backbone.body.patch_embed.proj.weight, source.patch_embed.proj.weight)
    segmenter = Segmentation(loads(yaml.safe_dump(scenes.RECIPE)).config).build(64)
    said = task.initialise(model, segmenter.state_dict(), Path("somewhere"), None)
    assert "pyramid and heads are new" in said
    assert torch.equal(
        model.backbone.body.patch_embed.proj.weight, segmenter.backbone.body.patch_embed.proj.weight
    )
    with pytest.raises(ConfigError, match=f"init.head=map picks rows of a {head}'s heads"):
        Detection(recipe("init.head=map", head=head)).initialise(model, source.state_dict(), Path("x"), None)


def test_another_detectors_heads_are_not_taken():
    task, other = Detection(recipe()), Detection(recipe(head="mask_rcnn"))
    model, source = task.build(64), other.build(64)
    before = model.head.classes.weight.clone()
    assert "pyramid and heads are new" in task.initialise(model, source.state_dict(), Path("x"), None)
    assert torch.equal(model.head.classes.weight, before)


def by_class(model, head):
    """Weights that have rows of classes, the class first, and those of the background."""
    if head == "retinanet":
        return [model.head.classes.weight.view(9, 3, -1).transpose(0, 1)], []
    box_head = next(module for module in model.modules() if isinstance(module, BoxHead))
    mask_head = next(module for module in model.modules() if isinstance(module, MaskHead))
    return (
        [box_head.classes.weight[:-1], box_head.boxes.weight.view(3, 4, -1), mask_head.masks.weight],
        [box_head.classes.weight[-1:], box_head.classes.bias[-1:]],
    )


@pytest.mark.parametrize("head", HEADS)
def test_rows_of_classes_are_kept_mapped_or_new(head, monkeypatch):
    known = names("box", "bar", "disc")
    source = Detection(recipe("train.seed=1", head=head)).build(64)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    tensors = source.state_dict()
    monkeypatch.setattr(
        detection.head, "source_classes", lambda path, count, guess: replace(known, count=count)
    )

    def started(how, own=known):
        task = Detection(recipe(f"init.head={how}", head=head))
        model, fresh = task.build(64), task.build(64)
        return model, fresh, task.initialise(model, tensors, Path("x"), own)

    kept, _, _ = started("keep")
    assert all(torch.equal(a, b) for a, b in zip(kept.state_dict().values(), tensors.values()))
    with pytest.raises(ConfigError, match="class 1 is 'bar'"):
        started("keep", names("box", "disc", "new"))
    mapped, fresh, said = started("map", names("disc", "box", "new"))
    assert "init.head=map" in said
    rows, rest = by_class(mapped, head)
    for new, old, drawn in zip(rows, by_class(source, head)[0], by_class(fresh, head)[0]):
        assert torch.equal(new[:2], old[[2, 0]]) and torch.equal(new[2], drawn[2])
    assert all(torch.equal(a, b) for a, b in zip(rest, by_class(source, head)[1]))
    new, fresh, said = started("new", names("a", "b", "c"))
    assert "kept but for the rows of the classes" in said
    for mine, drawn in zip(by_class(new, head)[0], by_class(fresh, head)[0]):
        assert torch.equal(mine, drawn)
    assert all(
        torch.equal(p, tensors[name])
        for name, p in new.named_parameters()
        if name.startswith(("backbone", "neck"))
    )


def test_heads_of_another_number_of_classes_fit_but_for_their_rows(monkeypatch):
    source = Detection(recipe("model.num_classes=5")).build(64)
    five = names("a", "bar", "b", "box", "c")
    monkeypatch.setattr(
        detection.head, "source_classes", lambda path, count, guess: replace(five, count=count)
    )
    task = Detection(recipe("init.head=map"))
    model = task.build(64)
    task.initialise(model, source.state_dict(), Path("x"), names("box", "bar", "disc"))
    old, new = (x.head.classes.weight.view(9, n, -1) for x, n in ((source, 5), (model, 3)))
    assert torch.equal(new[:, :2], old[:, [3, 1]])
    with pytest.raises(UserError, match="keep needs the same classes: .* has 5 .*init.head=map"):
        Detection(recipe()).initialise(task.build(64), source.state_dict(), Path("x"), None)


def test_tables_that_are_sampled_keep_their_shape_through_a_resume():
    task = Detection(recipe("model.img_size=128", "init.bias_table=sample"))
    source = zoo.create("dat_atto", num_classes=7, img_size=64).state_dict()
    started = task.build(128)
    said = task.initialise(started, source, Path("somewhere"), None)
    resumed = task.build(128, {name: p.shape for name, p in started.named_parameters()})
    assert "read at the displacements of" in said
    resumed.load_state_dict(started.state_dict())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.compile=block"], "train.compile=block compiles anew for every size"),
        (
            ["train.compile=block", "train.cuda_graphs=true", "geometry.crop=64", "geometry.copy_paste=0"],
            "train.cuda_graphs replays small micro-batches, and is not for task.kind=detection",
        ),
    ],
)
def test_settings_that_it_cannot_use_are_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        create_task(recipe(*overrides))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task.norm=sync"], "task.norm=sync is of CUDA devices, and this one is cpu; use task.norm=group"),
        (["task.norm=batch", "train.precision=bf16-pure"], "would keep them in 16 bits"),
    ],
)
def test_norms_are_of_cascades_alone(overrides, words):
    for head in ("cascade_rcnn", "mask_rcnn"):
        task = create_task(recipe("data.train=nowhere", *overrides, head=head))
        with pytest.raises(UserError, match=words if head == "cascade_rcnn" else "nowhere"):
            task.train_loader(rank=0, world=1, samples_seen=0, device=CPU, img_size=64)


def test_what_evaluation_needs_is_asked_for_at_the_start(monkeypatch):
    def missing():
        raise UserError("pip install")

    monkeypatch.setattr(coco_numbers, "check_installed", missing)
    with pytest.raises(UserError, match="pip install"):
        create_task(recipe("data.val=nowhere")).eval_loader(
            names("box", "bar", "disc"), rank=0, world=1, device=CPU, img_size=64
        )


def test_metrics_and_the_line_of_an_evaluation():
    boxes, masks = create_task(recipe()), create_task(recipe(head="mask_rcnn"))
    assert len(boxes.metrics) == 12 and len(masks.metrics) == 24 and "mask_ap75" in masks.metrics
    said = masks.summary({"ap": 41.2, "ap50": 60.0, "mask_ap": 37.35, "ema_ap": 42.0, "images": 5.0})
    assert said == "AP 41.20, AP50 60.00, mask AP 37.35, EMA AP 42.00"
