from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from host_waits import fake_cuda
from timm.data.mixup import Mixup, mixup_target

from dattrain.config.data_sections import Augment
from dattrain.data.augment.mixup import MixupCutmix, Normalize, hashed_normal
from dattrain.data.augment.plan import draw
from dattrain.data.batch import Batch

SIZE = (32, 48)


def batch(config: Augment, n: int = 8, *, seed: int = 0, start: int = 100, weight=None) -> Batch:
    generator = torch.Generator().manual_seed(start)
    plan = draw(config, seed, np.arange(start, start + n), SIZE)
    weight = torch.ones(n) if weight is None else torch.tensor(weight, dtype=torch.float32)
    return Batch(
        images=torch.randint(0, 256, (n, *SIZE, 3), dtype=torch.uint8, generator=generator).permute(
            0, 3, 1, 2
        ),
        labels=torch.arange(n) % 5,
        weight=weight,
        position=torch.arange(start, start + n),
        keys=[f"s:{i}" for i in range(n)],
        plan=plan,
    )


OFF = Augment(erase_prob=0, mixup=0, cutmix=0, label_smoothing=0)


def test_normalisation():
    b = batch(OFF)
    images, targets, weight = MixupCutmix(OFF, 5)(b)
    mean, std = torch.tensor(OFF.mean).view(3, 1, 1), torch.tensor(OFF.std).view(3, 1, 1)
    torch.testing.assert_close(images, (b.images / 255 - mean) / std, atol=2e-6, rtol=1e-5)
    assert images.is_contiguous() and weight is b.weight
    assert torch.equal(targets, torch.nn.functional.one_hot(b.labels, 5).float())
    half, _, _ = MixupCutmix(OFF, 5)(b, torch.bfloat16)
    assert torch.equal(half, images.bfloat16())
    floats = replace(b, images=images.bfloat16())
    assert torch.equal(Normalize(OFF)(floats.images), images.bfloat16().float()), "floats come normalised"


def test_mixup_and_smoothing_are_timms():
    """Pair mode of timm's Mixup on the same weights."""
    config = replace_config(OFF, mixup=0.8, label_smoothing=0.1)
    b = batch(config)
    images, targets, _ = MixupCutmix(config, 7)(b)
    plain, _, _ = MixupCutmix(OFF, 7)(replace(b, plan=None))
    plan = draw(config, 0, np.arange(100, 108), SIZE)
    for j, lam in enumerate(plan.mix[::2].tolist()):
        i, k = 2 * j, 2 * j + 1
        torch.testing.assert_close(images[i], plain[i] * lam + plain[k] * (1 - lam), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(images[k], plain[k] * lam + plain[i] * (1 - lam), atol=1e-5, rtol=1e-5)
        theirs = mixup_target(b.labels[[i, k]], 7, lam, 0.1)
        torch.testing.assert_close(targets[[i, k]], theirs, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))


def test_cutmix_is_timms(monkeypatch):
    """timm's own pair mixing, made to draw our boxes and weights."""
    config = replace_config(OFF, cutmix=1.0)
    b = batch(config)
    images, _, _ = MixupCutmix(config, 5)(b)
    plan = b.plan
    plain = MixupCutmix(OFF, 5)(replace(b, plan=None))[0]
    timm_mix = Mixup(mixup_alpha=0, cutmix_alpha=1.0, mode="pair", num_classes=5)
    boxes = iter([(t, t + h, l, l + w) for t, l, h, w in plan.mix_box[::2].tolist()])
    lams = iter(plan.mix[::2].tolist())
    monkeypatch.setattr("timm.data.mixup.cutmix_bbox_and_lam", lambda *a, **k: (next(boxes), next(lams)))
    monkeypatch.setattr(
        timm_mix, "_params_per_elem", lambda n: (np.full(n, 0.5, np.float32), np.ones(n, bool))
    )
    # timm pairs i with B - 1 - i; ours pairs neighbours.
    order = [0, 2, 4, 6, 7, 5, 3, 1]
    theirs = plain[order].clone()
    timm_mix._mix_pair(theirs)
    assert torch.equal(images[order], theirs)
    changed = (images != plain).any(1)
    for i, (t, l, h, w) in enumerate(plan.mix_box.tolist()):
        outside = changed[i].clone()
        outside[t : t + h, l : l + w] = False
        assert not outside.any()


@pytest.mark.parametrize("on", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_a_group_is_timms_batch_mode(on, monkeypatch):
    """timm's Mixup on each group as its batch, made to draw our weights and boxes."""
    config = replace_config(OFF, mix_group=8, label_smoothing=0.1, **on)
    b = batch(config, 32)
    images, targets, _ = MixupCutmix(config, 7)(b)
    plain = MixupCutmix(OFF, 7)(replace(b, plan=None))[0]
    kinds = set()
    for start in range(0, 32, 8):
        lam, (t, l, h, w) = float(b.plan.mix[start]), b.plan.mix_box[start].tolist()
        kinds.add(h > 0)
        theirs = Mixup(
            on.get("mixup", 0), on.get("cutmix", 0), mode="batch", label_smoothing=0.1, num_classes=7
        )
        monkeypatch.setattr(theirs, "_params_per_batch", lambda lam=lam, cut=h > 0: (lam, cut))
        drawn = ((t, t + h, l, l + w), lam)
        monkeypatch.setattr("timm.data.mixup.cutmix_bbox_and_lam", lambda *a, drawn=drawn, **k: drawn)
        x, y = theirs(plain[start : start + 8].clone(), b.labels[start : start + 8])
        torch.testing.assert_close(images[start : start + 8], x, atol=0 if h else 1e-6, rtol=0)
        torch.testing.assert_close(targets[start : start + 8], y, atol=1e-7, rtol=0)
    assert kinds == {"cutmix" in on} or len(on) == 2
    assert len(np.unique(b.plan.mix)) == 4, "a draw for each group"


def test_erasing_fills_its_box_with_normal_noise_and_nothing_else():
    config = replace_config(OFF, erase_prob=1.0)
    b = batch(config, 64)
    images = MixupCutmix(config, 5)(b)[0]
    plain = MixupCutmix(OFF, 5)(replace(b, plan=None))[0]
    inside = torch.zeros(64, *SIZE, dtype=torch.bool)
    for i, (t, l, h, w) in enumerate(b.plan.erase.tolist()):
        inside[i, t : t + h, l : l + w] = True
    mask = inside[:, None].expand_as(images)
    assert torch.equal(images[~mask], plain[~mask])
    noise = images[mask]
    assert len(noise) > 20_000
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02 and abs((noise**3).mean()) < 0.1
    assert len(noise.unique()) > 0.98 * len(noise)
    constant = MixupCutmix(replace_config(config, erase_mode="const"), 5)
    b = replace(b, plan=draw(replace_config(config, erase_mode="const"), 0, np.arange(100, 164), SIZE))
    assert (constant(b)[0][mask] == 0).all()


def test_noise_is_white():
    key = torch.full((40_000,), 12345)
    z = hashed_normal(key, torch.arange(40_000))
    other = hashed_normal(key + 1, torch.arange(40_000))
    for a, b in ((z[:-1], z[1:]), (z[:-48], z[48:]), (z, other)):
        assert abs(torch.corrcoef(torch.stack((a, b)))[0, 1]) < 0.025


def test_a_pair_looks_the_same_in_any_batch():
    """What a rank makes of a pair does not depend on what else is in its micro-batch."""
    config = Augment()
    whole = batch(config, 8)
    images, targets, _ = MixupCutmix(config, 5)(whole)
    part = replace(
        whole,
        images=whole.images[4:6],
        labels=whole.labels[4:6],
        weight=whole.weight[4:6],
        keys=whole.keys[4:6],
        plan=draw(config, 0, [104, 105], SIZE),
    )
    some, some_targets, _ = MixupCutmix(config, 5)(part)
    assert torch.equal(some, images[4:6]) and torch.equal(some_targets, targets[4:6])


@pytest.mark.parametrize("n", [0, 1, 3])
def test_odd_and_empty_batches_without_mixing(n):
    images, targets, _ = MixupCutmix(OFF, 5)(batch(OFF, n))
    assert images.shape == (n, 3, *SIZE) and targets.shape == (n, 5)


def test_the_mixer_moves_no_global_generator():
    state = torch.get_rng_state()
    MixupCutmix(Augment(), 5)(batch(Augment()))
    assert torch.equal(state, torch.get_rng_state())


def test_mixing_never_waits_for_the_device():
    config = Augment(erase_prob=1.0)
    b = batch(config)
    with fake_cuda() as waits:
        images = torch.empty(8, 3, *SIZE, dtype=torch.uint8, device="cuda")
        labels, weight = torch.empty(8, dtype=torch.int64, device="cuda"), torch.empty(8, device="cuda")
        MixupCutmix(config, 5)(replace(b, images=images, labels=labels, weight=weight))
    assert b.plan.mix_box.any() and not waits.found, waits.report()


def replace_config(config: Augment, **changes) -> Augment:
    return config.model_copy(update=changes)
