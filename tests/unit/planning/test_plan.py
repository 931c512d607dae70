"""The plan's figures against what a CPU measures: activations, state, and the arithmetic around them."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import scenes
import torch
import warm
import yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "dist"))
from state_ranks import finished, spawn

from dattrain.cli import plan as verb
from dattrain.cli.plan import render
from dattrain.config.load import dump, loads
from dattrain.config.schema import Config
from dattrain.engine import activation_checkpointing, memory
from dattrain.errors import ConfigError, UserError
from dattrain.models import flops, zoo
from dattrain.planning import plan
from dattrain.planning.decoding import images_per_core
from dattrain.submit import cpu_time
from dattrain.tasks.create import create_task

WITHIN = 0.15


def _config(**sections: dict[str, Any]) -> Config:
    base: dict[str, Any] = {
        "model": {"name": "dat_atto", "img_size": 64, "num_classes": 1000},
        "train": {"global_batch": 64, "micro_batch": 4},
    }
    return Config.model_validate({**base, **{k: {**base.get(k, {}), **v} for k, v in sections.items()}})


def _loss(model: torch.nn.Module, config: Config) -> torch.Tensor:
    images = torch.rand(config.train.micro_batch, 3, config.model.img_size, config.model.img_size)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
        logits = model(images)
    targets = torch.rand(config.train.micro_batch, config.model.num_classes)
    return -(targets * logits.float().log_softmax(dim=-1)).sum()


def _saved(model: torch.nn.Module, config: Config) -> int:
    """Bytes that autograd keeps for backward, seen through its own hooks; weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = _loss(model, config)
    total = sum(storage.nbytes() for storage in found.values())
    del loss
    return total


def _highest(model: torch.nn.Module, config: Config) -> int:
    """The most bytes that the allocator handed out at once in a step, by the profiler's record of every allocation."""

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(drop)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        _loss(model, config).backward()
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


@pytest.mark.parametrize(
    ("precision", "mode"),
    [("fp32", "none"), *(("bf16", mode) for mode in ("none", "selective", "block", "stage"))]
    + [pytest.param("fp32", mode, marks=pytest.mark.full) for mode in ("selective", "block", "stage")],
)
def test_activations_are_within_15_percent_of_a_measured_step(precision: str, mode: str) -> None:
    config = _config(train={"precision": precision, "activation_checkpointing": mode})
    model = zoo.create("dat_atto", num_classes=1000, img_size=64).train()
    found = memory.activations(model, config, micro_batch=4, device="cpu")
    real = copy.deepcopy(model)
    activation_checkpointing.apply(real, mode)  # type: ignore[arg-type]
    if mode == "none":
        assert found.kept == pytest.approx(_saved(real, config), rel=WITHIN)
    assert found.peak == pytest.approx(_highest(real, config), rel=WITHIN)


def test_activations_of_cuda_are_followed_without_a_driver() -> None:
    config = _config(train={"precision": "bf16"})
    model = zoo.create("dat_atto", num_classes=1000, img_size=64).train()
    cuda = memory.activations(model, config, micro_batch=4, device="cuda")
    cpu = memory.activations(model, config, micro_batch=4, device="cpu")
    # CUDA's autocast keeps LayerNorm and softmax in fp32, the CPU's does not.
    assert cpu.kept < cuda.kept < 1.6 * cpu.kept
    assert cuda.peak >= cuda.kept
    assert next(model.parameters()).device.type == "cpu"


def test_activations_grow_with_the_micro_batch_and_shrink_with_recomputation() -> None:
    model = zoo.create("dat_atto", num_classes=10, img_size=64).train()
    kept = {
        (mode, batch): memory.activations(
            model,
            _config(model={"img_size": 64, "num_classes": 10}, train={"activation_checkpointing": mode}),
            micro_batch=batch,
            device="cpu",
        ).kept
        for mode, batch in (("none", 4), ("none", 8), ("block", 8))
    }
    # What autocast keeps of the weights does not grow.
    assert 1.5 * kept["none", 4] < kept["none", 8] <= 2 * kept["none", 4]
    assert kept["block", 8] < kept["none", 8] / 3


CASES = [
    ("bf16", 2, 2, False),
    ("bf16", 3, 2, True),
    *((precision, stage, 2, True) for precision in ("fp32", "bf16-pure") for stage in (0, 1, 2, 3)),
    ("fp32", 2, 1, True),
]


@pytest.mark.parametrize(
    ("precision", "stage", "world"),
    [
        pytest.param(
            precision,
            stage,
            world,
            marks=[pytest.mark.full] if long else [],
            id=f"{precision}-Z{stage}-{world}",
        )
        for precision, stage, world, long in CASES
        if (precision, stage) != ("bf16-pure", 0)
    ],
)
def test_states_are_within_15_percent_of_what_deepspeed_holds(
    precision: str, stage: int, world: int, tmp_path: Path
) -> None:
    recipe, out = tmp_path / "c.yaml", tmp_path / "out.json"
    name = "dat_atto" if precision == "bf16" and stage == 2 else "dat_tiny"
    recipe.write_text(
        f"model: {{name: {name}, img_size: 64}}\naugment: {{mix_prob: 0}}\n"
        f"train: {{precision: {precision}, global_batch: {world}, micro_batch: 1, ema_decay: 0.9}}\nzero: {{stage: {stage}}}\n"
    )
    worker = Path(__file__).with_name("plan_worker.py")
    finished(spawn(world, [str(worker), str(recipe), str(out)]))
    measured = json.loads(out.read_text())["bytes"]
    parameters = sum(p.numel() for p in zoo.create(name, num_classes=1000, img_size=64).parameters())
    found = memory.states(parameters, world=world, stage=stage, precision=precision, ema=True, device="cpu")
    assert found.standing == pytest.approx(measured, rel=WITHIN)


def test_arithmetic_of_steps_hours_and_reading() -> None:
    config = _config(
        model={"img_size": 32, "num_classes": 10},
        data={"labels": "imagenet-1k"},
        schedule={"epochs": 2, "warmup_epochs": 0},
    )
    found = plan.plan(config, plan.Resources(nodes=2, gpus_per_node=4, images_per_second=1000, device="cpu"))
    assert found["steps"] == -(-2 * 1_281_167 // 64)
    assert found["hours"] == pytest.approx(found["steps"] * 64 / 1000 / 3600)
    assert found["read_bytes_per_s"] == 1000 * plan.IMAGE_BYTES
    assert found["decoding"]["cores_per_node"] == pytest.approx(
        500 / images_per_core((32, 32), randaugment=True)
    )
    assert found["accumulation"] == 2
    assert found["parameters"] == sum(
        p.numel() for p in zoo.create("dat_atto", num_classes=10, img_size=32).parameters()
    )
    assert found["checkpoint_bytes"] == 12 * found["parameters"]
    assert found["problems"] == []
    assert "1,281,167 images an epoch" in verb.render(config, found)


@pytest.mark.parametrize("name", cpu_time.GFLOPS)
def test_the_bound_on_cpus_counts_as_the_models_do(name: str) -> None:
    with torch.device("meta"):
        model = zoo.create(name, num_classes=1000, img_size=224)
    assert flops.flops(model, 224) / 1e9 == pytest.approx(cpu_time.GFLOPS[name], rel=2e-3)


def test_a_plan_of_cpus_alone_says_how_long_it_takes_at_least() -> None:
    config = _config(data={"labels": "imagenet-1k"}, schedule={"epochs": 3e6})
    found = plan.plan(config, plan.Resources(nodes=2, gpus_per_node=1, cpu_cores=4, device="cpu"))
    days = found["steps"] * 64 * 6 * 0.303e9 * (64 / 224) ** 2 / (8 * cpu_time.CORE) / 86400
    assert found["cpu_time"]["seconds"] == pytest.approx(days * 86400)
    assert f"on 2 CPU task(s) of 4 core(s): at least {days / 365.25:,.0f} years" in verb.render(config, found)
    assert plan.plan(config, plan.Resources(gpus_per_node=1, device="cpu"))["cpu_time"] is None


def test_a_plan_of_a_segmentation_counts_the_decoder_and_the_crop() -> None:
    """On CPUs the bound is of the backbone at the size of the crop."""
    overrides = ["geometry.crop=[64,96]", "schedule.warmup_updates=0", "model.name=dat_atto"]
    config = loads(yaml.safe_dump(scenes.RECIPE), overrides).config
    resources = plan.Resources(nodes=1, gpus_per_node=1, cpu_cores=2, samples=100, device="cpu")
    found = plan.plan(config, resources)
    model = create_task(config).build(64)
    assert found["parameters"] == sum(p.numel() for p in model.parameters()) and found["steps"] == 4
    assert found["flops_per_image"] == flops.flops(model, (64, 96))
    # Per image and class 64 x 96 scores, their logarithms and their gradients, for one image at a time.
    assert found["bytes_per_device"]["activations_peak"] > 3 * 4 * 4 * 64 * 96
    seconds = 4 * 8 * 6 * 0.303e9 * 64 * 96 / 224**2 / (2 * cpu_time.CORE)
    assert found["cpu_time"]["seconds"] == pytest.approx(seconds)
    assert "scenes: dat_atto with upernet at (64, 96), " in verb.render(config, found)


def test_a_network_that_cannot_recompute_everything_is_planned_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def activations(model: torch.nn.Module, config: Config, **_: Any) -> memory.Activations:
        activation_checkpointing.apply(model, config.train.activation_checkpointing)
        return memory.Activations(1, 2)

    monkeypatch.setattr(memory, "activations", activations)
    overrides = ["model.name=swin_tiny_patch4_window7_224", "model.img_size=224", "geometry.crop=64"]
    config = loads(yaml.safe_dump(scenes.RECIPE), overrides).config
    resources = plan.Resources(nodes=1, gpus_per_node=1, samples=100, device="cpu")
    assert list(plan.plan(config, resources)["activations_by_mode"]) == ["none", "block", "stage"]
    chosen = loads(dump(config), ["train.activation_checkpointing=selective"]).config
    with pytest.raises(UserError, match="selective is for DAT's blocks"):
        plan.plan(chosen, resources)


def test_what_does_not_fit_is_called_a_problem(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("signal_delay_s: 1\ntasks_per_node: 2\n")
    config = _config(model={"img_size": 32, "num_classes": 10}, data={"labels": "imagenet-1k"})
    found = plan.plan(
        config,
        plan.Resources(cluster=str(tmp_path / "c.yaml"), device_gb=0.01, images_per_second=10, device="cpu"),
    )
    memory, save = found["problems"]
    assert "train.micro_batch" in memory
    assert "signal_delay_s" in save


def test_images_at_hand_are_counted_and_weighed(tmp_path: Path) -> None:
    from PIL import Image

    for number in range(64):
        folder = tmp_path / "data" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + number, 8)).save(folder / f"{number}.png")
    config = _config(model={"img_size": 32, "num_classes": 2}, data={"train": str(tmp_path / "data")})
    found = plan.plan(config, plan.Resources(gpus_per_node=1, device="cpu"))
    assert (found["samples_per_epoch"], found["samples_from"]) == (64, "the data")
    sizes = [path.stat().st_size for path in tmp_path.rglob("*.png")]
    assert found["image_bytes"] == pytest.approx(sum(sizes) / 64)
    config = _config(model={"img_size": 32, "num_classes": 3}, data={"train": str(tmp_path / "data")})
    with pytest.raises(ConfigError, match=r"has 2 classes \(class0, class1\), but model.num_classes=3"):
        plan.plan(config, plan.Resources(gpus_per_node=1, device="cpu"))


def test_without_any_count_of_images_it_asks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--samples"):
        plan.plan(_config(), plan.Resources(gpus_per_node=1))
    # A schedule in updates does not ask for it, wherever the data are.
    config = _config(
        schedule={"updates": 90, "warmup_updates": 0}, data={"train": "elsewhere"}, model={"img_size": 32}
    )
    found = plan.plan(config, plan.Resources(gpus_per_node=1, device="cpu"))
    assert (found["steps"], found["samples_per_epoch"]) == (90, None)
    assert "not at hand, and schedule.updates=90 needs no count of its images; 90 steps" in render(
        config, found
    )
    with pytest.raises(ConfigError, match="cannot be split over 5 devices"):
        plan.plan(_config(data={"labels": "imagenet-1k"}), plan.Resources(gpus_per_node=5))


@pytest.mark.parametrize(
    ("asked", "gb", "taken"), [(48, 80.0, 16), ("auto", 80.0, 16), ("auto", 1e-3, 1)], ids=str
)
def test_a_micro_batch_is_planned_as_it_will_be_taken(asked: int | str, gb: float, taken: int) -> None:
    config = _config(data={"labels": "imagenet-1k"}, train={"global_batch": 64, "micro_batch": asked})
    found = plan.plan(config, plan.Resources(gpus_per_node=4, device_gb=gb, device="cpu"))
    assert (found["micro_batch"], found["accumulation"]) == (taken, 16 // taken)
    assert f"4 devices x {taken} x {16 // taken} accumulated (train.micro_batch={asked})" in render(
        config, found
    )


def test_the_verb_needs_no_device(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "model: {name: dat_atto, img_size: 32}\ntrain: {global_batch: 64, micro_batch: 8}\n"
    )
    done = warm.run(
        [sys.executable, "-m", "dattrain", "plan", "r.yaml", "--gpus-per-node", "1", "--samples", "640"],
        cwd=tmp_path, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "activations by train.activation_checkpointing" in done.stdout
