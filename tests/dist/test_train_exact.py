"""N updates in one go equal k, a resume, and N - k: bit for bit, for every stage and precision. And: all of them agree."""

import json
import math
from pathlib import Path

import pytest
from state_ranks import assert_same, finished, spawn, states
from train_worker import curve, pack, recipe, rows

STEPS, CUT = 4, 2
FAST = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]
RESUMED = [(0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
"""Of these; the others with --full. Every one is resumed as a state alone in test_exact.py."""
LONG = [(stage, "bf16-pure") for stage in (1, 2, 3)]
REMAT = ["stage", "block", "selective"]
BUCKETS = [2, 3]
WORKER = str(Path(__file__).parent / "train_worker.py")


def run_jobs(folder, jobs, world=2, **environment):
    plan = folder / f"plan_{len(list(folder.glob('plan_*')))}.json"
    plan.write_text(json.dumps(jobs))
    return finished(spawn(world, [WORKER, str(plan)], **environment), timeout=900)


def halves(path, folder, data, stage, precision, extra=()):
    """Jobs of one combination: in one go, the first half, the rest."""
    name = f"z{stage}-{precision}"
    both = [
        *data,
        f"zero.stage={stage}",
        f"train.precision={precision}",
        f"train.max_steps={STEPS}",
        *extra,
    ]
    return [
        [str(path), str(folder / f"{name}-whole"), both],
        [str(path), str(folder / f"{name}-parts"), [*both, f"train.max_steps={CUT}"]],
        [str(path), str(folder / f"{name}-parts"), both],
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("exact")
    data, path = pack(folder)[:1], recipe(folder)
    jobs = []
    for stage, precision in FAST:
        found = halves(path, folder, data, stage, precision)
        jobs += found if (stage, precision) in RESUMED or request.config.getoption("--full") else found[:1]
        if stage in BUCKETS and precision == "bf16":
            # Here, since stage 3 changes torch's linear layers for the rest of the process.
            settings = [f"zero.stage={stage}", "train.precision=bf16", "train.max_steps=2"]
            settings.append("zero.extra={reduce_bucket_size: 300}")
            jobs.append([str(path), str(folder / f"buckets-{stage}"), [*data, *settings]])
    for mode in REMAT:
        settings = [
            "zero.stage=3",
            "train.precision=bf16",
            f"train.activation_checkpointing={mode}",
            "train.max_steps=2",
        ]
        jobs.append([str(path), str(folder / f"recompute-{mode}"), [*data, *settings]])
    print(run_jobs(folder, jobs)[0])
    return folder


@pytest.mark.parametrize(
    "stage, precision",
    [pytest.param(*one, marks=[] if one in RESUMED else pytest.mark.full) for one in FAST],
)
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(trained, stage, precision):
    whole, parts = (trained / f"z{stage}-{precision}-{kind}" for kind in ("whole", "parts"))
    assert [row["step"] for row in rows(whole)] == list(range(1, STEPS + 1))
    assert curve(whole) == curve(parts)
    assert_same(states(whole, STEPS), states(parts, STEPS))


@pytest.mark.parametrize("precision, bound", [("fp32", 2e-5), ("bf16", 2e-2)])
def test_every_stage_gives_the_same_curve(trained, precision, bound):
    # In fp32 the stages differ by the order of sums; in bf16 such a difference flips roundings.
    curves = [[row["loss"] for row in rows(trained / f"z{stage}-{precision}-whole")] for stage in range(4)]
    for other in curves[1:]:
        assert other == pytest.approx(curves[0], rel=bound)


@pytest.mark.parametrize("mode", REMAT)
def test_recomputed_activations_change_nothing(trained, mode):
    plain = [(row["loss"], row["grad_norm"]) for row in rows(trained / "z3-bf16-whole")][:2]
    assert [(row["loss"], row["grad_norm"]) for row in rows(trained / f"recompute-{mode}")] == plain


@pytest.mark.parametrize("stage", BUCKETS)
def test_gradients_reduced_in_many_buckets_are_the_same(trained, stage):
    """The test's model fits into one as a rule; here most matrices do not fit into any."""
    plain = [(row["loss"], row["grad_norm"]) for row in rows(trained / f"z{stage}-bf16-whole")][:2]
    assert [(row["loss"], row["grad_norm"]) for row in rows(trained / f"buckets-{stage}")] == plain


def test_rows_hold_what_they_promise(trained):
    for row in rows(trained / "z2-bf16-whole"):
        assert row["samples"] == 32 * row["step"]
        assert row["epoch"] == pytest.approx(row["samples"] / 96, abs=1e-6)
        assert row["images_per_s"] > 0 and 0 <= row["data_wait"] <= 1 and row["memory_gb"] > 0
        assert row["bad_samples"] == row["skipped_steps"] == 0
        assert math.isfinite(row["grad_norm"]) and row["eta_s"] >= 0


def test_the_run_folder_tells_what_ran(trained):
    run = trained / "z1-fp32-parts"
    starts = json.loads((run / "env.json").read_text())["starts"]
    assert len(starts) == 2 and starts[0]["world"] == 2 and starts[0]["versions"]["torch"]
    assert "revision" in json.loads((run / "code.json").read_text())
    # Appended by the second start, not begun anew.
    for rank in range(2):
        assert (run / "logs" / f"rank_{rank}.log").read_text().count("updates ") >= 2 * (rank == 0)
    assert "resumed from" in (run / "logs" / "rank_1.log").read_text()
    assert list((run / "tensorboard").glob("events.*"))


@pytest.mark.full
@pytest.mark.parametrize("stage, precision", LONG)
def test_pure_bf16_resumes_bit_for_bit(tmp_path, stage, precision):
    data, path = pack(tmp_path)[:1], recipe(tmp_path)
    run_jobs(tmp_path, halves(path, tmp_path, data, stage, precision))
    whole, parts = (tmp_path / f"z{stage}-{precision}-{kind}" for kind in ("whole", "parts"))
    assert curve(whole) == curve(parts)
    assert_same(states(whole, STEPS), states(parts, STEPS))


@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_resumes_bit_for_bit_with_its_loss_scale(tmp_path, stage):
    data, path = pack(tmp_path)[:1], recipe(tmp_path)
    run_jobs(tmp_path, halves(path, tmp_path, data, stage, "fp16"), DATTRAIN_TEST="tests_fp16")
    whole, parts = (tmp_path / f"z{stage}-fp16-{kind}" for kind in ("whole", "parts"))
    scales = [row["loss_scale"] for row in rows(whole)]
    assert scales == [row["loss_scale"] for row in rows(parts)] and len(scales) == STEPS
    assert [row["loss"] for row in rows(whole)] == [row["loss"] for row in rows(parts)]
    assert_same(states(whole, STEPS), states(parts, STEPS))
