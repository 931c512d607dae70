"""``dattrain bench step``: a whole run on a tiny model, the same work for every contender, and time charged to the right part."""

from __future__ import annotations

import argparse
import json
import logging
import sys

import pytest
import torch

from dattrain.bench import step as bench
from dattrain.bench import step_parts
from dattrain.bench.contender import BASELINE, Contender, captured_warnings, open_contender
from dattrain.cli import bench_step
from dattrain.cli.main import main
from dattrain.engine import compile as compiling
from dattrain.errors import ConfigError
from dattrain.runtime import environment

TINY = ["model.name=dat_atto", "model.img_size=32", "model.num_classes=10", "train.micro_batch=2"]
TINY += ["train.global_batch=2", "train.precision=fp32", "train.threads=1"]
CPU = torch.device("cpu")


def contender(*changes: str, accumulation: int = 1) -> Contender:
    found = open_contender("one", bench.read([*TINY, *changes], accumulation), CPU, [])
    assert found is not None
    return found


@pytest.fixture(scope="module")
def group():
    """One for all: DeepSpeed keeps groups of the first, and cannot have a second in a process."""
    with environment.process_group(environment.resolve({}), CPU):
        yield


@pytest.mark.parametrize("key", ["train.tf32", "train.deterministic"])
def test_what_holds_for_the_process_is_not_varied_within_it(key):
    with pytest.raises(ConfigError, match=f"{key} holds for the whole process"):
        bench.variants(bench.read(TINY, 1), [f"{key}=true,false"])


def test_a_whole_run(group, tmp_path, capsys, monkeypatch):
    """Compilation is refused, as on a machine without a compiler; that the compiled update is right is tested elsewhere."""
    from torch._dynamo.exc import Unsupported

    def refuse(forward, **_):
        def fail(*args, **kwargs):
            raise Unsupported("no compiler here")

        return fail

    monkeypatch.setattr(torch, "compile", refuse)
    files = {kind: tmp_path / f"step.{kind}" for kind in ("json", "md", "png")}
    words = ["--json", files["json"], "--markdown", files["md"], "--picture", files["png"], "--rounds", 1]
    command = ["bench", "step", *TINY, *map(str, words)]
    monkeypatch.setattr(sys, "argv", ["dattrain", *command])
    assert main(command) == 0
    report = json.loads(files["json"].read_text())
    rows = {m["name"]: m for m in report["measurements"]}
    assert list(rows) == [
        "recipe", "train.activation_checkpointing=selective", "train.activation_checkpointing=block", "train.activation_checkpointing=stage", "train.compile=block",
        "train.precision=bf16",
    ]  # fmt: skip
    assert {m["case"] for m in rows.values()} == {"32 px B2 fp32 ZeRO-2"} and rows["recipe"]["items"] == 2
    kept = [
        rows[f"train.activation_checkpointing={mode}"]["extra"]["MB kept/image"]
        for mode in ("stage", "block", "selective")
    ]
    assert 0 < kept[0] < kept[1] < kept[2] < rows["recipe"]["extra"]["MB kept/image"]
    losses = {name: float(row["extra"]["first loss"]) for name, row in rows.items()}
    assert len({losses[name] for name in losses if "precision" not in name}) == 1, "the same work"
    assert losses["train.precision=bf16"] == pytest.approx(losses["recipe"], rel=0.02)
    parts = report["breakdowns"][0]["parts"]
    assert list(parts) == list(step_parts.PARTS) and all(parts[name][0] > 0 for name in step_parts.PARTS)
    told = [note for note in report["notes"] if "compile" in note]
    assert len(told) == 1 and "train.compile=block" in told[0] and "no compiler here" in told[0]
    shown, page = capsys.readouterr().out, files["md"].read_text()
    assert "clip and AdamW" in shown and "| clip and AdamW |" in page and "dattrain bench step" in page
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_an_update_is_what_the_trainer_does(group):
    """Its batches are mixed, its average moves, and its rate is the recipe's."""
    one = contender("optim.lr=1e-2", "train.ema_decay=0.5", accumulation=2)
    session = one.session
    assert (
        session.ema is not None
        and session.train_step.accumulation == 2
        and session.engine.zero_optimization_stage() == 2
    )
    average = [x.clone() for x in session.ema.tensors]
    update = one()
    assert update.applied and len(update.keys) == 4 and update.weight == 4
    assert session.engine.basic_optimizer.param_groups[0]["lr"] == 1e-2
    assert any(not torch.equal(a, b) for a, b in zip(average, session.ema.tensors))
    batch = next(one.batches)
    assert batch.images.dtype == torch.uint8 and batch.plan is not None and (batch.plan.mix < 1).any()
    one.close()


def test_time_is_charged_to_the_innermost_part():
    now = [0.0]
    watch = step_parts.Stopwatch(lambda: None, lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    inner = watch.timed("inner", lambda: wait(3))

    def outer() -> None:
        wait(1)
        inner()
        wait(2)

    watch.timed("outer", outer)()
    wait(10)
    inner()
    assert watch.spent == {"outer": 3, "inner": 6}


def test_the_parts_add_up_to_the_update_and_nothing_stays_behind(group):
    one = contender("train.ema_decay=0")
    clock = iter(range(10**6))
    parts = step_parts.take_apart(one.session, one, 2, clock=lambda: float(next(clock)))
    # The clock ticks at every border: forward is entered, left for mixing, entered again; the others once.
    ticks = {
        step_parts.MIXING: 1,
        step_parts.FORWARD: 2,
        step_parts.BACKWARD: 1,
        step_parts.OPTIMIZER: 1,
        step_parts.REST: 4,
    }
    assert {name: part.median for name, part in parts.items()} == ticks
    for owner in (one.session.train_step, one.session.engine):
        assert not {"forward", "backward", "step"} & set(vars(owner))
    assert type(one.session.train_step.task.mixer).__name__ == "MixupCutmix"
    one.close()


def test_what_is_varied(tmp_path):
    config = bench.read([*TINY, "train.activation_checkpointing=block"], 4)
    assert config.train.global_batch == 8
    found = bench.variants(
        config, ["train.activation_checkpointing=none,block", "zero.stage=1,2,3", "train.micro_batch=4"]
    )
    assert list(found) == [
        "train.activation_checkpointing=none",
        "zero.stage=1",
        "zero.stage=3",
        "train.micro_batch=4",
    ]
    assert (
        found["zero.stage=3"].zero.stage == 3
        and found["zero.stage=3"].train.activation_checkpointing == "block"
    )
    assert found["train.micro_batch=4"].train.global_batch == 8
    for wrong, message in (
        ("train.activation_checkpointing", "say KEY=VALUE,VALUE"),
        ("train.activation_checkpointing=no", "train.activation_checkpointing"),
        ("train.activation_checkpoint=none", "did you mean train.activation_checkpointing"),
        ("train.global_batch=4", "other images"),
    ):
        with pytest.raises(ConfigError, match=message):
            bench.variants(config, [wrong])


def test_a_recipe_is_a_file_or_a_run_folder_without_what_it_starts_from(tmp_path):
    text = "init: {from: nowhere, head: new}\ntrain: {global_batch: 64, micro_batch: 4, progressive: [{epoch: 1, img_size: 64}]}"
    (tmp_path / "config.yaml").write_text(text + "\nmodel: {img_size: 32}\n")
    for path in (tmp_path, tmp_path / "config.yaml"):
        config = bench.read([str(path), "train.micro_batch=2"], 1)
        assert config.init.from_ is None and config.train.progressive == ()
        assert config.train.global_batch == config.train.micro_batch == 2
    with pytest.raises(ConfigError, match="no such config"):
        bench.read([str(tmp_path / "missing.yaml")], 1)
    parser = argparse.ArgumentParser()
    bench_step.add_arguments(parser)
    assert parser.parse_args([]).recipe == []
    assert bench.read([], 1).model.name == "dat_tiny"


def test_updates_that_were_skipped_are_said(group, monkeypatch):
    one = contender()
    monkeypatch.setattr(one, "lr", float("nan"))
    one()
    one()
    assert one.skipped == 1, "after the first, weights and so gradients are not finite"
    one.close()


def test_warnings_are_captured_warnings_and_go_no_further(caplog):
    with caplog.at_level(logging.WARNING), captured_warnings(compiling.log) as lines:
        compiling.log.warning("one %s", "line")
    compiling.log.warning("another")
    assert lines == ["one line"] and [r.getMessage() for r in caplog.records] == ["another"]


def test_a_setting_that_is_none_for_the_recipe_is_left_out():
    words = [
        "task.kind=segmentation", "task.head=semantic_fpn", "task.norm=group", "geometry.crop=null", "eval.batch=1",
        "augment={randaugment: null, mix_prob: 0, erase_prob: 0, label_smoothing: 0}",
    ]  # fmt: skip
    config = bench.read([*TINY, *words], 1)
    notes = []
    varied = bench.variants(config, ["train.compile=block"])["train.compile=block"]
    assert open_contender("train.compile=block", varied, CPU, notes) is None
    assert notes[0].startswith("train.compile=block: left out: train.compile=block compiles anew")
    with pytest.raises(ConfigError, match="compiles anew"):
        open_contender(BASELINE, varied, CPU, notes)
