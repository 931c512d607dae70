"""Batched augmentation against Pillow, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from host_waits import fake_cuda
from PIL import Image

from dattrain.config.data_sections import Augment
from dattrain.data.augment import plan, randaugment
from dattrain.data.augment.cpu_transforms import train_image
from dattrain.data.augment.device_transforms import augment as on_device
from dattrain.data.to_device import stage

SIZE = (96, 128)


def photos(count: int, seed: int = 0) -> torch.Tensor:
    """Smooth, noisy, dark, flat and two-valued images, B x H x W x 3 uint8."""
    rng = np.random.default_rng(seed)
    out = np.empty((count, *SIZE, 3), np.uint8)
    for i in range(count):
        small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(small).resize(SIZE[::-1], Image.Resampling.BICUBIC)).astype(int)
        noise = rng.integers(-40, 41, (*SIZE, 3))
        kinds = (
            smooth + noise,
            smooth // 3 + 20,
            smooth,
            np.full((*SIZE, 3), rng.integers(256)),
            (smooth > 128) * 200,
        )
        out[i] = np.clip(kinds[i % len(kinds)], 0, 255)
    return torch.from_numpy(out)


def plan_of(count: int, **settings) -> plan.AugmentPlan:
    return plan.draw(Augment(crop_scale=(1, 1), hflip=0, **settings), 5, np.arange(count), SIZE)


def by_pillow(images: torch.Tensor, plan: plan.AugmentPlan) -> torch.Tensor:
    """Through the CPU decoder's own function, with a crop of everything."""
    out = torch.empty_like(images)
    whole = replace(
        plan,
        crop=np.tile(np.array([1.0, SIZE[1] / SIZE[0], 0, 0]), (*plan.crop.shape[:2], 1)),
        flip=plan.flip & False,
    )
    for i, image in enumerate(images):
        train_image(image.permute(2, 0, 1), whole, i, out[i])
    return out


CASES = [
    (op, interpolation)
    for op in randaugment.OPERATIONS
    for interpolation in ("bicubic", "bilinear")
    if op in randaugment.GEOMETRIC or interpolation == "bicubic"
]


@pytest.mark.parametrize(
    ("op", "interpolation"), CASES, ids=lambda x: x if isinstance(x, str) else x.name.lower()
)
def test_each_operation(op, interpolation):
    count = 30
    rng = np.random.default_rng(int(op))
    levels, negative = rng.uniform(0, 10, count), rng.random(count) < 0.5
    ops = np.full((count, 1), int(op), np.int8)
    args = randaugment.arguments(ops[:, 0], levels, negative, increasing=bool(int(op) % 2))[:, None]
    plan = replace(plan_of(count, randaugment=None, interpolation=interpolation), ops=ops, args=args)
    images = photos(count, int(op))
    expected = by_pillow(images, plan)
    changed = (expected != images).flatten(1).any(1)
    assert changed.sum() > count // 3, "the operation does nothing, so this shows nothing"
    on_device(images, plan, np.ones(count, bool))
    assert torch.equal(images, expected)


def test_a_whole_policy_with_jitter():
    count = 80
    plan = plan_of(count, randaugment="rand-m9-n3-mstd0.5-inc1", color_jitter=0.4)
    images = photos(count)
    expected = by_pillow(images, plan)
    on_device(images, plan, np.ones(count, bool))
    assert torch.equal(images, expected)


def test_only_the_rows_that_are_asked_for():
    plan = plan_of(20, randaugment="rand-m9-p1")
    images = photos(20)
    before, rows = images.clone(), np.arange(20) % 2 == 0
    expected = by_pillow(images, plan)
    on_device(images, plan, rows)
    assert torch.equal(images[1::2], before[1::2]) and torch.equal(images[::2], expected[::2])


def test_the_host_does_not_wait_for_the_device():
    """Every operation, and more images of one than a chunk holds, on fake CUDA tensors."""
    ops = [*randaugment.OPERATIONS, *[randaugment.Op.ROTATE] * 40]
    count = len(ops)
    plan = replace(
        plan_of(count, randaugment=None, color_jitter=0.4),
        ops=np.array(ops, np.int8)[:, None],
        args=randaugment.arguments(
            np.array(ops), np.full(count, 5.0), np.zeros(count, bool), increasing=True
        )[:, None],
    )
    with fake_cuda() as waits:
        pixels = torch.empty(count, *SIZE, 3, dtype=torch.uint8, device="cuda")
        on_device(pixels, plan, np.ones(count, bool))
    assert not waits.found, waits.report()


def test_staging_is_one_copy_of_pinned_memory(monkeypatch):
    """The tensors are the arrays, whatever their shapes, types and alignment."""
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 9, 7),
        rng.integers(0, 255, (5, 3), dtype=np.uint8),
        np.empty((0, 4), np.int64),
        rng.random((6, 5)).T,
        rng.random(3).astype(np.float32),
        np.broadcast_to(np.float64(0.5), (2, 2)),
    ]
    assert all(np.array_equal(a, t.numpy()) for a, t in zip(arrays, stage(arrays, torch.device("cpu"))))
    copies = []

    def to(tensor, device, non_blocking):
        copies.append((tensor.dtype, device, non_blocking, any(tensor is p for p in pinned)))
        return tensor.clone()

    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.clone()) or pinned[-1]
    )
    monkeypatch.setattr(torch.Tensor, "to", to)
    device = torch.device("cuda", 0)
    staged = stage(arrays, device)
    assert copies == [(torch.uint8, device, True, True)]
    for array, tensor in zip(arrays, staged):
        assert tensor.shape == array.shape and np.array_equal(array, tensor.numpy())
        assert tensor.dtype == torch.from_numpy(np.empty(0, array.dtype)).dtype
