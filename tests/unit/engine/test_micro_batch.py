"""The micro-batch that a device takes: the recipe's bound, and what ``auto`` makes of a device's memory."""

import logging

import pytest
import torch

from dattrain.config.derive import with_micro_batch
from dattrain.config.load import loads
from dattrain.engine import micro_batch, resume_rules
from dattrain.errors import UserError
from dattrain.runtime import host_memory

TINY = "model: {name: dat_atto, img_size: 32, num_classes: 4}\nzero: {stage: 1}\n"
CPU = torch.device("cpu")


def recipe(batch, micro, more=""):
    return loads(
        f"{TINY}train: {{global_batch: {batch}, micro_batch: {micro}, precision: fp32{more}}}"
    ).config


def test_a_bound_that_does_not_divide_is_said_and_one_that_does_is_not(caplog):
    caplog.set_level(logging.INFO)
    settled = micro_batch.settle(recipe(96, 40), 2, CPU, 2)
    assert settled.train.micro_batch == 24
    assert caplog.messages == [
        "train.micro_batch=40 is an upper bound: 24 is the largest number up to it that divides 48 samples a device (96 over 2)"
    ]
    caplog.clear()
    assert micro_batch.settle(recipe(96, 24), 2, CPU, 2).train.micro_batch == 24 and not caplog.messages


def test_auto_takes_what_fits_and_never_more():
    config = recipe(48, "auto")
    fits = micro_batch.by_memory(config, 1, device="cpu", budget=1e12)
    assert fits == [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]
    assert micro_batch.by_memory(config, 1, device="cpu", budget=0) == [1]
    # Where 12 are let in, 12 need no more than that by the model itself, and 16 do.
    from dattrain.engine import memory
    from dattrain.tasks.create import create_task

    model = create_task(config).build(32)
    states = memory.states(
        sum(p.numel() for p in model.parameters()), world=1, stage=1, precision="fp32", device="cpu"
    ).total
    need = {n: states + memory.activations(model, config, micro_batch=n, device="cpu").peak for n in (12, 16)}
    fits = micro_batch.by_memory(config, 1, device="cpu", budget=(need[12] + need[16]) / 2)
    assert fits[-1] == 12


def test_auto_on_a_cpu_says_what_it_took(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(host_memory, "available", lambda: 10**12)
    assert micro_batch.settle(recipe(128, "auto"), 1, CPU, 1).train.micro_batch == micro_batch.MOST["cpu"]
    assert "train.micro_batch=auto: 64 at a time of 128 samples a device" in caplog.text
    monkeypatch.setattr(host_memory, "available", lambda: 0)
    assert micro_batch.settle(recipe(128, "auto"), 1, CPU, 1).train.micro_batch == 1


def test_on_a_gpu_a_trial_step_that_does_not_fit_takes_the_next(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**12, 10**12))
    tried = []

    def passes(task, config, count, world, device, most=12):
        tried.append(count)
        if count > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(micro_batch, "_pass", passes)
    device = torch.device("cuda", 0)
    assert micro_batch.settle(recipe(48, "auto"), 1, device, 1).train.micro_batch == 12
    assert tried == [48, 24, 16, 12]
    monkeypatch.setattr(micro_batch, "_pass", lambda *a: passes(*a, most=0))
    with pytest.raises(UserError, match="not even 1 sample.* of dat_atto at 32 fit cuda:0"):
        micro_batch.settle(recipe(4, "auto"), 1, device, 1)


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 1), ("bf16-pure", 2)])
def test_the_trial_step_is_one_that_runs_beside_what_deepspeed_holds(monkeypatch, precision, stage):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    config = loads(
        f"{TINY}train: {{global_batch: 4, micro_batch: auto, precision: {precision}, channels_last: true, "
        f"activation_checkpointing: block, ema_decay: 0.9}}",
        [f"zero.stage={stage}", "train.progressive=[{epoch: 1, img_size: 64}]"],
    ).config
    seen, made, empty = [], [], torch.empty
    task = micro_batch.create_task(with_micro_batch(config, 2))
    build = task.build

    def watched(size):
        seen.append(size)
        model = build(size)
        made.extend(model.parameters())
        return model

    task.build = watched

    def ballast(*size, **options):
        if options.get("dtype") is not torch.uint8:
            return empty(*size, **options)
        seen.append(size[0])
        return empty(0, **options)

    monkeypatch.setattr(torch, "empty", ballast)
    micro_batch._pass(task, config, 2, 1, CPU)
    assert seen[0] == 64, "the largest size of the run"
    count = sum(p.numel() for p in made)
    # Two moments and the average at least, weights left out.
    assert max(each for each in seen if isinstance(each, int)) >= 12 * count
    assert all(p.grad is None for p in made)


def test_a_resume_may_have_another_micro_batch():
    assert "train.micro_batch" not in resume_rules.settings(recipe(4, 4))


def test_memory_of_a_host_is_the_least_that_anyone_grants(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable:      50 kB\n")
    assert host_memory.available(meminfo, tmp_path) == 50 * 1024
    (tmp_path / "memory.max").write_text("30000\n")
    (tmp_path / "memory.current").write_text("10000\n")
    assert host_memory.available(meminfo, tmp_path) == 20_000
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory.available(meminfo, tmp_path) == 50 * 1024
    assert host_memory.available(tmp_path / "none", tmp_path) > 0
