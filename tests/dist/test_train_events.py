"""What happens on the way: preemption, the stop file, steps that are not finite, progressive resizing, evaluation, averages."""

import json
import re
from pathlib import Path

import pytest
import torch
from state_ranks import assert_same, finished, spawn, states
from train_worker import curve, pack, recipe, rows

from dattrain.config.load import load

WORKER = str(Path(__file__).parent / "train_scenarios.py")
HEALTH = "train.health={max_bad_steps: 2, max_rollbacks: 1}"
EVERY = ["checkpoint.every_steps=1", "checkpoint.keep_last=20"]
GROW = "train.progressive=[{epoch: 1, img_size: 64}]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    """Everything is run in one pair of processes; the tests read what it left."""
    folder = tmp_path_factory.mktemp("events")
    data, path = pack(folder), str(recipe(folder))
    plan = []

    def job(name, run, overrides, at=None):
        plan.append([name, "attempt", [path, str(folder / run), [*data[:1], *overrides], at or {}]])

    plan.append(["layer-decay", "layer_decay", [str(folder)]])
    # Preempted at update 3 by a signal to rank 1 alone, then stopped by hand, then to the end; and in one go, with evaluations.
    two = ["zero.stage=2", "train.precision=fp32", "train.max_steps=5"]
    job("preempted", "events", two, {"3": "USR2"})
    job("stopped", "events", two, {"4": "stop"})
    job("ended", "events", two)
    seen = [f"data.val={folder}/val", "eval.every_epochs=0.34", "eval.batch=4"]
    job("whole", "whole", [*two, *EVERY, *seen])
    # Nothing gains 200 points: two evaluations after the first it is over, between two saves; and again after a preemption, and anew.
    early = ["zero.stage=2", "train.precision=fp32", "train.max_steps=9", "eval.every_epochs=0.34", "eval.batch=4"]
    early += [f"data.val={folder}/val", "train.early_stopping_patience=2", "train.early_stopping_min_delta=200"]
    job("early", "early", early)
    job("early-cut", "early-parts", early, {"2": "USR2"})
    job("early-resumed", "early-parts", early)
    job("early-again", "early-parts", early)
    for stage in range(4):
        job(
            f"skip-{stage}",
            f"skip-{stage}",
            [f"zero.stage={stage}", *EVERY, HEALTH, "train.max_steps=3"],
            {"2": "nan"},
        )
    three = ["zero.stage=3", "train.precision=fp32", HEALTH, *EVERY, "train.max_steps=9"]
    job("rollback", "rollback", three, {"3": "nan", "4": "nan", "6": "nan", "7": "nan"})
    for stage in (0, 3) if request.config.getoption("--full") else (3,):
        grow = [f"zero.stage={stage}", "train.precision=fp32", GROW, "train.max_steps=5"]
        job(f"grow-{stage}", f"grow-{stage}", grow)
        job(f"grow-{stage}-a", f"grow-{stage}-parts", [*grow, "train.max_steps=3"])  # up to the very boundary
        job(f"grow-{stage}-b", f"grow-{stage}-parts", [*grow, "train.max_steps=4"])
        job(f"grow-{stage}-c", f"grow-{stage}-parts", grow)
    (folder / "plan.json").write_text(json.dumps(plan))
    print(finished(spawn(2, [WORKER, str(folder / "plan.json")]), timeout=900)[0])
    return folder


def said(folder, name):
    """What both ranks reported of a job; they must agree."""
    first, second = (json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(2))
    assert first == second
    return first


def test_a_signal_to_one_rank_saves_on_all_and_asks_to_be_started_again(folder):
    assert said(folder, "preempted") == {"status": "preempted", "step": 3, "code": 75, "restored": True}


def test_the_stop_file_saves_and_ends_for_good(folder):
    assert said(folder, "stopped") == {"status": "stopped", "step": 4, "code": 0, "restored": True}
    assert not (folder / "events" / "stop").exists()


def test_each_start_says_how_it_ended_and_which_rank_was_asked(folder):
    starts = json.loads((folder / "events" / "env.json").read_text())["starts"]
    assert [(start["step"], start["last_step"], start["end"]["step"]) for start in starts] == [(0, 5, 3), (3, 5, 4), (4, 5, 5)]  # fmt: skip
    ends = [(start["end"]["status"], start["end"]["why"]) for start in starts]
    assert [status for status, _ in ends] == ["preempted", "stopped", "finished"]
    assert ends[0][1].startswith("SIGUSR2 at rank 1 on ")
    assert ends[1][1] == f"the file {folder}/events/stop" and ends[2][1] == "train.max_steps=5"


def test_whatever_interrupted_it_the_run_is_the_undisturbed_one(folder):
    assert said(folder, "ended")["status"] == "finished"
    # The undisturbed one was evaluated after every update, its weights swapped for the averages and back.
    assert curve(folder / "events") == curve(folder / "whole")
    assert_same(states(folder / "events", 5), states(folder / "whole", 5))


def test_early_stopping_ends_a_resumed_run_where_it_ends_an_undisturbed_one_and_for_good(folder):
    assert said(folder, "early-cut")["status"] == "preempted"
    for name in ("early", "early-resumed", "early-again"):
        assert said(folder, name) == {"status": "finished", "step": 3, "code": 0, "restored": True}, name
    for run in ("early", "early-parts"):
        assert [row["evaluations_without_improvement"] for row in rows(folder / run, "top1")] == [0, 1, 2]
        log = (folder / run / "logs" / "rank_0.log").read_text()
        assert "stopped early: top1 has not improved for 2 evaluations" in log
    assert_same(states(folder / "early", 3), states(folder / "early-parts", 3))


def test_evaluation_sees_each_image_once_and_computes_what_one_process_does(folder):
    from dattrain.data.classes import Classes
    from dattrain.data.factory import eval_loader
    from dattrain.data.augment.mixup import Normalize
    from dattrain.tasks.create import create_task

    config = load(folder / "whole" / "config.yaml").config
    found = rows(folder / "whole", "top1")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    assert all(row["eval_images"] == 21 for row in found)
    held = states(folder / "whole", 5)
    loader = eval_loader(
        config, Classes(config.model.num_classes), rank=0, world=1, device=torch.device("cpu"), img_size=32
    )
    normalize = Normalize(config.augment)
    for state, prefix in (("param", ""), ("ema", "ema_")):
        model = create_task(config).build(32).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(held[f"{state}/{name}"])
            parts = [(model(normalize(batch.images)), batch.labels) for batch in loader]
        logits, labels = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
        top5 = (logits.topk(5).indices == labels[:, None]).any(1).double().mean()
        loss = torch.nn.functional.cross_entropy(logits, labels)
        assert found[-1][f"{prefix}top1"] == pytest.approx(
            float((logits.argmax(1) == labels).double().mean() * 100)
        )
        assert found[-1][f"{prefix}top5"] == pytest.approx(float(top5 * 100))
        assert found[-1]["ema_loss" if prefix else "eval_loss"] == pytest.approx(float(loss), rel=1e-5)
    loader.close()


def test_the_average_equals_an_unsharded_one_bit_for_bit(folder):
    from dattrain.tasks.create import create_task

    config = load(folder / "whole" / "config.yaml").config
    average = {name: p.detach() for name, p in create_task(config).build(32).named_parameters()}
    for step in range(1, 6):
        held = states(folder / "whole", step)
        average = {name: torch.lerp(a, held[f"param/{name}"], 1.0 - 0.9) for name, a in average.items()}
        for name, value in average.items():
            assert torch.equal(value, held[f"ema/{name}"]), (step, name)


@pytest.mark.parametrize("stage", range(4))
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(folder, stage):
    run = folder / f"skip-{stage}"
    assert said(folder, f"skip-{stage}")["status"] == "finished"
    first, third = states(run, 1), states(run, 3)
    assert [row["loss"] is None for row in rows(run)] == [False, True, False]
    assert rows(run)[-1]["skipped_steps"] == 1
    # Nothing was saved while the last step was bad, and the third changed what the first had left.
    assert not (run / "checkpoints" / "step_00000002").exists()
    assert all(torch.isfinite(tensor).all() for tensor in third.values())
    assert any(not torch.equal(first[key], third[key]) for key in first if key.startswith("param/"))
    manifest = json.loads((run / "checkpoints" / "step_00000003" / "manifest.json").read_text())
    steps = {p[2] for p in manifest["manifest"]["parameters"].values()}
    assert steps == {2}, "Adam counts applied updates alone"


def test_after_rollbacks_the_run_stops_and_leaves_a_debug_dump(folder):
    run = folder / "rollback"
    error = said(folder, "rollback")["error"]
    assert "after 1 rollbacks" in error and "step_00000007" in error
    log = (run / "logs" / "rank_0.log").read_text()
    assert "rolling back to the weights of step 2, training on past step 4" in log
    rows_of_bad = re.findall(r"step (\d) was not finite and was skipped \((\d) in a row\)", log)
    assert rows_of_bad == [("3", "1"), ("4", "2"), ("6", "1"), ("7", "2")]
    # The position moved on, the weights went back.
    back, before = states(run, 4), states(run, 2)
    assert_same(back, before)
    assert [row["samples"] for row in rows(run)] == [32 * step for step in range(1, 8)]
    dump = run / "health" / "step_00000007"
    sides = [json.loads((dump / f"rank_{rank}.json").read_text()) for rank in range(2)]
    assert [side["finite_loss"] for side in sides] == [True, False]
    keys = sides[0]["keys"] + sides[1]["keys"]
    assert len(set(keys)) == 32
    norms = json.loads((dump / "norms.json").read_text())
    held = states(run, 5)
    for name, row in norms.items():
        assert row["norm"] == pytest.approx(float(held[f"param/{name}"].double().norm()), rel=1e-6)
        assert row["non_finite"] == 0


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.full), 3])
def test_the_image_grows_on_the_way_and_a_resume_is_exact_at_and_after_the_boundary(folder, stage):
    whole, parts = folder / f"grow-{stage}", folder / f"grow-{stage}-parts"
    assert curve(whole) == curve(parts)
    last = states(whole, 5)
    assert_same(last, states(parts, 5))
    small, large = states(whole, 3), last
    tables = [key for key in small if key.startswith("param/") and small[key].shape != large[key].shape]
    assert tables and all("bias_table" in key for key in tables)


def test_layer_wise_rates_equal_an_unpartitioned_adamw_with_a_group_per_layer_under_every_stage(folder):
    found = said(folder, "layer-decay")
    elements = sum(7 * n + n for n in (9, 10, 11))
    for stage in range(4):
        row = found[str(stage)]
        assert row["equal"] and row["groups"] == 2
        assert row["elements"] == elements * (2 if stage == 0 else 1)
