import pytest
import torch
from timm.scheduler import CosineLRScheduler

from dattrain.config.derive import Derived
from dattrain.config.sections import Schedule
from dattrain.engine.schedule import rate


def derived(total=50, warmup=7, peak=1e-3, low=1e-5, start=1e-6):
    return Derived(
        world=1,
        micro_batch=1,
        accumulation=1,
        steps_per_epoch=10,
        total_steps=total,
        last_step=total,
        warmup_steps=warmup,
        milestones=(20, 35),
        peak_lr=peak,
        min_lr=low,
        warmup_lr=start,
        checkpoint_steps=1,
        eval_steps=1,
    )


@pytest.mark.parametrize("warmup", [0, 1, 7, 50])
def test_cosine_is_timms_for_every_update(warmup):
    d = derived(warmup=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=d.peak_lr)
    timm = CosineLRScheduler(
        optimizer,
        t_initial=d.total_steps,
        lr_min=d.min_lr,
        warmup_t=d.warmup_steps,
        warmup_lr_init=d.warmup_lr,
        warmup_prefix=False,
        cycle_limit=1,
        t_in_epochs=False,
    )
    for update in range(d.total_steps + 5):
        timm.step_update(update)
        assert rate(Schedule(kind="cosine"), d, update) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-12
        ), update


def test_linear_ends_at_the_minimum_and_constant_stays():
    d = derived()
    assert rate(Schedule(kind="linear"), d, 0) == d.warmup_lr
    assert rate(Schedule(kind="linear"), d, 7) == d.peak_lr
    assert rate(Schedule(kind="linear"), d, 50) == pytest.approx(d.min_lr)
    # Half way between the end of the warm-up and the end.
    assert rate(Schedule(kind="linear"), derived(total=27), 17) == pytest.approx((d.peak_lr + d.min_lr) / 2)
    assert {rate(Schedule(kind="constant"), d, update) for update in range(7, 60)} == {d.peak_lr}


@pytest.mark.parametrize("power", (0.9, 1.0))
def test_poly_is_mmcvs_poly_policy_under_its_linear_warm_up(power):
    d, updates = derived(peak=6e-5, low=0.0, start=6e-11), 50
    ratio = d.warmup_lr / d.peak_lr  # mmcv's warmup_ratio
    for update in range(updates):
        regular = d.peak_lr * (1 - update / updates) ** power
        warm = 1 - (1 - update / 7) * (1 - ratio) if update < 7 else 1
        found = rate(Schedule(kind="poly", power=power), d, update)
        assert found == pytest.approx(regular * warm, rel=1e-12), update
    assert rate(Schedule(kind="poly"), d, 60) == 0


def test_step_is_mmcvs_step_policy_under_its_linear_warm_up():
    d = derived(peak=2e-4, low=0.0, start=2e-7)
    schedule = Schedule(kind="step", milestones=(8.0, 11.0), gamma=0.1)
    for update in range(50):
        regular = d.peak_lr * 0.1 ** ((update >= 20) + (update >= 35))
        warm = 1 - (1 - update / 7) * (1 - 1e-3) if update < 7 else 1
        assert rate(schedule, d, update) == pytest.approx(regular * warm, rel=1e-12), update
