"""timm's own pieces, put together as its train.py does, train our registered model on shards that we packed."""

from __future__ import annotations

import pytest
import timm
import timm.data
import timm.loss
import timm.optim
import timm.scheduler
import timm.utils
import torch

import dattrain.models  # noqa: F401 (registers the variants)
from dattrain.cli import main as cli
from dattrain.data.prepare.arrays import read_idx

CLASSES, SIZE = 10, 64


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    from importlib import resources

    import numpy as np

    root = tmp_path_factory.mktemp("fashion")
    folder = resources.files("dattrain") / "demo"
    images = read_idx(str(folder / "t10k-images-idx3-ubyte.gz"))
    labels = read_idx(str(folder / "t10k-labels-idx1-ubyte.gz"))
    for split, part in (("train", slice(0, 512)), ("validation", slice(512, 640))):
        np.savez(root / f"{split}.npz", images=images[part], labels=labels[part])
        command = ["data", "pack", str(root / f"{split}.npz"), str(root / "shards"), "--split", split]
        assert cli.main([*command, "--per-shard", "128", "--jobs", "1"]) == 0
    return root / "shards"


def loader(root, split, training, batch=32):
    dataset = timm.data.create_dataset(
        "wds/fashion",
        root=str(root),
        split=split,
        is_training=training,
        batch_size=batch,
    )
    return timm.data.create_loader(
        dataset,
        input_size=(3, SIZE, SIZE),
        batch_size=batch,
        is_training=training,
        use_prefetcher=False,
        num_workers=1,
        scale=(0.6, 1.0) if training else None,
        auto_augment="rand-m5-mstd0.5-inc1" if training else None,
        crop_pct=1.0,
        persistent_workers=False,
        device=torch.device("cpu"),
    )


def test_one_epoch_with_timms_train_loop(shards):
    torch.manual_seed(0)
    model = timm.create_model(
        "dat_atto", pretrained=False, num_classes=CLASSES, img_size=SIZE, drop_path_rate=0.1
    )
    model.set_grad_checkpointing(True)
    optimizer = timm.optim.create_optimizer_v2(
        model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.9
    )
    # Biases and position tables are not decayed, and the groups follow the layers.
    named = {id(p): n for n, p in model.named_parameters()}
    assert all(
        "bias_table" not in named[id(p)]
        for g in optimizer.param_groups
        if g["weight_decay"]
        for p in g["params"]
    )
    assert len({g["lr_scale"] for g in optimizer.param_groups}) > 4
    train = loader(shards, "train", training=True)
    steps = len(train)
    scheduler, _ = timm.scheduler.create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=1,
        warmup_epochs=0,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    mixup = timm.data.Mixup(mixup_alpha=0.2, cutmix_alpha=0.0, label_smoothing=0.0, num_classes=CLASSES)
    criterion, ema = timm.loss.SoftTargetCrossEntropy(), timm.utils.ModelEmaV3(model, decay=0.5)
    model.train()
    losses = []
    for step, (images, labels) in enumerate(train):
        images, targets = mixup(images, labels)
        loss = criterion(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        timm.utils.dispatch_clip_grad(timm.models.model_parameters(model), 5.0, mode="norm")
        optimizer.step()
        ema.update(model)
        scheduler.step_update(step + 1, metric=float(loss))
        losses.append(float(loss))
    assert len(losses) == steps == 16
    assert sum(losses[-4:]) < 0.85 * sum(losses[:4])
    top1 = timm.utils.AverageMeter()
    ema.module.eval()
    with torch.no_grad():
        for images, labels in loader(shards, "validation", training=False):
            top1.update(timm.utils.accuracy(ema.module(images), labels)[0].item(), len(images))
    assert top1.count == 128 and top1.avg > 25
