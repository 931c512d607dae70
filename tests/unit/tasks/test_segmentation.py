"""Segmentation's loss, weights and settings."""

from dataclasses import replace
from pathlib import Path

import pytest
import scenes
import torch
import torch.nn.functional as F
import yaml
from host_waits import fake_cuda, faked

from dattrain.config.load import loads
from dattrain.data.classes import Classes
from dattrain.data.dense_batch import SegmentationBatch
from dattrain.engine import memory
from dattrain.errors import ConfigError
from dattrain.models import zoo
from dattrain.tasks import segmentation
from dattrain.tasks.create import create_task
from dattrain.tasks.segmentation import Segmentation, pixel_cross_entropy

CPU = torch.device("cpu")


def recipe(*overrides):
    return loads(yaml.safe_dump(scenes.RECIPE), overrides).config


def batch(maps, sizes=None, weight=None):
    count, height, width = maps.shape
    return SegmentationBatch(
        images=torch.randint(256, (count, 3, height, width), dtype=torch.uint8),
        maps=maps,
        sizes=torch.tensor(sizes or [[height, width]] * count),
        weight=torch.tensor(weight or [1.0] * count),
        position=torch.arange(count),
        keys=[f"k{n}" for n in range(count)],
    )


def random_maps(count, size=64, void=0.2, classes=4):
    maps = torch.randint(classes, (count, size, size), dtype=torch.uint8)
    maps[torch.rand(maps.shape) < void] = 255
    return maps


def test_the_loss_is_mmsegs_with_its_gradient():
    torch.manual_seed(0)
    maps = random_maps(3)
    logits = torch.randn(3, 4, 16, 16, requires_grad=True)
    aux = torch.randn(3, 4, 4, 4, requires_grad=True)
    task = Segmentation(recipe("train.micro_batch=3", "train.global_batch=3"))
    loss = task.loss(lambda x: (logits, aux), batch(maps), noise=None, dtype=torch.float32)
    loss.value.backward()
    found = logits.grad.clone(), aux.grad.clone()
    logits.grad = aux.grad = None
    # mmseg: resize, cross_entropy(reduction="none", ignore_index=255), and the plain mean.
    parts = [
        factor
        * F.cross_entropy(
            F.interpolate(x, (64, 64), mode="bilinear"), maps.long(), reduction="none", ignore_index=255
        ).mean()
        for factor, x in ((1.0, logits), (0.4, aux))
    ]
    sum(parts).backward()
    assert loss.value.item() == pytest.approx(sum(parts).item(), rel=1e-6)
    assert {name: float(x) / 3 for name, x in loss.parts.items()} == pytest.approx(
        {"loss_decode": parts[0].item(), "loss_aux": parts[1].item()}, rel=1e-6
    )
    assert float(loss.total) / float(loss.weight) == pytest.approx(sum(parts).item(), rel=1e-6)
    for mine, plain in zip(found, (logits.grad, aux.grad)):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-9)


def test_whole_images_are_divided_by_their_own_area():
    maps = random_maps(2)
    maps[1, 20:] = maps[1, :, 30:] = 255
    logits = torch.randn(2, 4, 16, 16)
    task = Segmentation(recipe("geometry.crop=null"))
    losses = [
        float(
            task.loss(
                lambda x: logits, batch(maps, [[64, 64], [20, 30]], w), noise=None, dtype=torch.float32
            ).total
        )
        for w in ([1.0, 0.0], [0.0, 1.0])
    ]
    sums = pixel_cross_entropy(logits, maps)
    assert losses == pytest.approx([float(sums[0]) / 64**2, float(sums[1]) / 600], rel=1e-6)


def test_bad_and_void_samples_give_nothing_and_nothing_infinite():
    task = Segmentation(recipe())
    logits = torch.randn(2, 4, 16, 16, requires_grad=True)
    maps = random_maps(2)
    maps[0] = 255
    loss = task.loss(lambda x: logits, batch(maps, weight=[1.0, 0.0]), noise=None, dtype=torch.float32)
    loss.value.backward()
    assert (float(loss.value.detach()), float(loss.total), float(loss.weight), loss.parts) == (
        0.0,
        0.0,
        1.0,
        {},
    )
    assert torch.equal(logits.grad, torch.zeros_like(logits))
    # A bad sample counts in the divisor.
    loss = task.loss(
        lambda x: logits, batch(random_maps(2), weight=[1.0, 0.0]), noise=None, dtype=torch.float32
    )
    assert float(loss.value.detach()) == pytest.approx(float(loss.total) / 2)


@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
def test_the_loss_is_the_same_however_the_batch_is_cut(head):
    torch.manual_seed(0)
    whole = batch(random_maps(4))
    base = Segmentation(recipe(f"task.head={head}", "train.micro_batch=4"))
    model = base.build(64).train()
    noise = torch.rand(4, base.noise_width(model))
    found = {}
    for size in (4, 2, 1):
        task = Segmentation(recipe(f"task.head={head}", f"train.micro_batch={size}"))
        total = 0.0
        model.zero_grad()
        for first in range(0, 4, size):
            some = slice(first, first + size)
            piece = SegmentationBatch(
                whole.images[some],
                whole.maps[some],
                whole.sizes[some],
                whole.weight[some],
                whole.position[some],
                whole.keys[some],
            )
            loss = task.loss(model, piece, noise=noise[some], dtype=torch.float32)
            (loss.value * size / 4).backward()
            total += float(loss.value.detach()) * size / 4
        found[size] = total, torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    assert found[2][0] == pytest.approx(found[4][0], rel=1e-6) and found[1][0] == pytest.approx(
        found[4][0], rel=1e-6
    )
    for size in (2, 1):
        distance = (found[size][1] - found[4][1]).norm() / found[4][1].norm()
        assert distance < 1e-4
    other = base.loss(model, whole, noise=torch.rand_like(noise), dtype=torch.float32)
    assert abs(float(other.value.detach()) - found[4][0]) > 1e-5, "the noise is used"


def test_enlarged_scores_are_there_for_one_sample_at_a_time():
    classes, side, count = 50, 64, 8
    one = 4 * classes * side * side
    maps = random_maps(count, side, classes=classes)
    logits = torch.randn(count, classes, side // 4, side // 4, requires_grad=True)
    with memory.Ledger([logits, maps]) as ledger:
        pixel_cross_entropy(logits, maps).sum().backward()
        assert ledger.peak < 5 * one < count * one


def test_memory_of_a_step_is_found_without_a_device_also_with_sync_norm():
    small = ["train.micro_batch=auto", "task.head=semantic_fpn", "task.channels=16"]
    config = recipe("task.norm=sync", *small)
    model = create_task(config).build(64)
    crop = memory.activations(model, config, micro_batch=2, device="cuda")
    whole = memory.activations(model, recipe("geometry.crop=null", *small), micro_batch=2, device="cpu")
    # 96 x 192 at the largest scale, 4.5 times the crop.
    assert 0 < crop.kept < crop.peak and 3 < whole.kept / crop.kept < 7


def test_an_example_is_what_a_loader_gives():
    task = Segmentation(recipe("geometry.crop=[64,96]"))
    made = task.example(3, 64, CPU, first=6)
    assert (
        made.images.shape == (3, 3, 64, 96)
        and made.images.dtype == torch.uint8
        and made.maps.shape == (3, 64, 96)
    )
    assert made.position.tolist() == [6, 7, 8] and len(made) == 3 and int(made.maps.max()) == 3
    assert torch.isfinite(task.loss(task.build(64).train(), made, noise=None, dtype=torch.float32).value)


def test_a_micro_batch_never_waits_for_the_device():
    cuda = torch.device("cuda")
    config = recipe("train.precision=bf16")
    task = Segmentation(config)
    model = task.build(64).train()
    with fake_cuda() as waits:
        network = faked(model)
        made = task.example(2, 64, torch.device("cpu"), dtype=torch.float32)
        images, maps, weight = (
            torch.empty_like(x, device=cuda) for x in (made.images, made.maps, made.weight)
        )
        made = replace(made, images=images, maps=maps, weight=weight)
        loss = task.loss(
            network, made, noise=torch.empty(2, model.num_drop_path, device=cuda), dtype=torch.float32
        )
    assert loss.value.device.type == "cuda" and not waits.found, waits.report()


def names(*own):
    return Classes(len(own), own, "here")


def test_weights_of_a_classification_go_into_the_backbone_whatever_the_head(monkeypatch):
    task = Segmentation(recipe())
    model = task.build(64)
    source = zoo.create("dat_atto", num_classes=7, img_size=64)
    said = task.initialise(model, source.state_dict(), Path("somewhere"), names(*scenes.CLASSES))
    assert "the decoder is new" in said and "head.fc.weight" in said
    assert torch.equal(model.backbone.body.patch_embed.proj.weight, source.patch_embed.proj.weight)
    with pytest.raises(ConfigError, match="init.head=map picks the rows of a decoder"):
        Segmentation(recipe("init.head=map")).initialise(model, source.state_dict(), Path("x"), None)


def test_tables_that_are_sampled_keep_their_shape_through_a_resume():
    task = Segmentation(recipe("model.img_size=128", "init.bias_table=sample"))
    source = zoo.create("dat_atto", num_classes=7, img_size=64).state_dict()
    started, fresh = task.build(128), {name: p.shape for name, p in task.build(128).named_parameters()}
    said = task.initialise(started, source, Path("somewhere"), None)
    shapes = {name: p.shape for name, p in started.named_parameters()}
    assert "read at the displacements of" in said and shapes != fresh
    resumed = task.build(128, shapes)
    resumed.load_state_dict(started.state_dict())
    x = torch.rand(1, 3, 64, 96)
    assert torch.equal(resumed.eval()(x), started.eval()(x))


def test_a_classification_does_not_start_from_a_segmentation():
    task = create_task(
        loads("model: {name: dat_atto, img_size: 64, num_classes: 4}\ninit: {from: dense}").config
    )
    tensors = Segmentation(recipe()).build(64).state_dict()
    with pytest.raises(ConfigError, match="init.from=dense: are weights of a network with maps"):
        task.initialise(task.build(64), tensors, Path("x"), None)


def test_a_decoder_is_kept_by_the_names_of_its_classes(monkeypatch):
    source = Segmentation(recipe("train.seed=1")).build(64)
    for name, tensor in source.state_dict().items():
        if "classifier.conv.bias" in name:
            tensor += torch.arange(4.0)
    tensors, model = source.state_dict(), Segmentation(recipe()).build(64)
    monkeypatch.setattr(
        segmentation.head, "source_classes", lambda path, count, guess: names("ground", "box", "bar", "disc")
    )
    Segmentation(recipe()).initialise(model, tensors, Path("x"), names("ground", "box", "bar", "disc"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), tensors.values()))
    other = names("ground", "bar", "box", "new")
    with pytest.raises(ConfigError, match="class 1 is 'box'"):
        Segmentation(recipe()).initialise(model, tensors, Path("x"), other)
    model = Segmentation(recipe()).build(64)
    drawn = model.head.classifier.conv.weight[3].clone()
    said = Segmentation(recipe("init.head=map")).initialise(model, tensors, Path("x"), other)
    assert "init.head=map" in said
    weight, own = model.head.classifier.conv.weight, source.head.classifier.conv.weight
    assert torch.equal(weight[:3], own[[0, 2, 1]]) and torch.equal(weight[3], drawn)
    assert model.aux_head.classifier.conv.bias[:3].tolist() == [0, 2, 1]
    model = Segmentation(recipe()).build(64)
    Segmentation(recipe("init.head=new")).initialise(model, tensors, Path("x"), other)
    assert torch.equal(model.head.classifier.conv.weight[3], drawn)
    assert torch.equal(model.backbone.norms[0].weight, source.backbone.norms[0].weight)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["task.norm=batch", "train.micro_batch=1"],
            "a device's one sample of a micro-batch has no statistics",
        ),
        (["eval.mode=slide", "eval.stride=65"], r"eval.stride=65 is more than geometry.crop=64"),
        (["geometry.crop=null", "train.compile=block"], "train.compile=block compiles anew for every size"),
        (["train.compile=block", "train.cuda_graphs=true"], "train.cuda_graphs replays small micro-batches"),
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
def test_a_norm_that_cannot_be_used_is_said_before_any_data_is_looked_for(overrides, words):
    task = create_task(recipe("data.train=nowhere", *overrides))
    with pytest.raises(ConfigError, match=words):
        task.train_loader(rank=0, world=1, samples_seen=0, device=CPU, img_size=64)


def test_networks_of_timm_are_backbones_and_flops_are_those_of_the_crop():
    swin = create_task(
        recipe(
            "model.name=swin_tiny_patch4_window7_224",
            "geometry.crop=[512,2048]",
            "task.channels=null",
            "task.norm=sync",
            "model.num_classes=150",
        )
    )
    # Table 5 of the paper: 945 G at 512 x 2048, the auxiliary head left out.
    assert swin.flops(224) == pytest.approx(945e9, rel=2e-3)
