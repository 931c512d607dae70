"""``dattrain train`` as a person uses it: launchers, resuming, fine-tuning, mistakes, and processes that end cleanly."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm

sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))
from state_ranks import assert_same, states
from train_worker import curve, pack, recipe, rows

FP32 = ["train.precision=fp32", "zero.stage=2"]


def dattrain(*arguments, launcher=(), run=warm.run, timeout=300):
    """Warm, ranks and all; tests/e2e/test_wheel.py starts cold."""
    command = [sys.executable, *launcher, "-m", "dattrain", *map(str, arguments)]
    return run(command, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    return folder, recipe(folder), pack(folder)


@pytest.fixture(scope="module")
def trained(home):
    """Two updates on two local ranks, evaluated."""
    folder, path, data = home
    run = folder / "trained"
    done = dattrain(
        "train",
        path,
        *data,
        *FP32,
        "train.max_steps=2",
        "train.profile.steps=[1,2]",
        "--run",
        run,
        "--nproc",
        2,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return run


def test_two_local_ranks_equal_torchrun_and_nearly_one_process(home, trained):
    folder, path, data = home
    other = folder / "torchrun"
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        "--no-python",
        sys.executable,
    ]
    settings = [*data, *FP32, "train.max_steps=2"]
    done = dattrain("train", path, *settings, "--run-dir", other, launcher=torchrun)
    assert done.returncode == 0, done.stdout + done.stderr
    assert curve(other) == curve(trained)
    alone = folder / "alone"
    done = dattrain("train", path, *settings, "--run", alone)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [r["loss"] for r in rows(alone)] == pytest.approx([r["loss"] for r in rows(trained)], rel=2e-6)


def test_a_folder_has_one_training_and_one_that_lost_it_ends_on_all_its_ranks(home):
    folder, path, data = home
    run = folder / "twice"
    settings = [*data, *FP32, "schedule.epochs=4000", "train.max_steps=12000", "checkpoint.every_steps=2"]
    command = [
        sys.executable,
        "-m",
        "dattrain",
        "train",
        str(path),
        *settings,
        "--run",
        str(run),
        "--nproc",
        "2",
    ]
    with open(folder / "twice.log", "w") as log, warm.Popen(command, stdout=log, stderr=log) as first:
        try:
            while first.poll() is None and not list(run.glob("checkpoints/step_*4")):
                time.sleep(0.05)
            before = (run / "config.yaml").read_text()
            record = json.loads((run / "owner.json").read_text())
            second = dattrain("train", path, *settings, "optim.lr=9e-3", "--run", run, "--nproc", 2)
            assert second.returncode == 1 and "finished" not in second.stdout, second.stdout + second.stderr
            said = [line for line in second.stderr.splitlines() if line.startswith("dattrain train: ")]
            assert len(said) == 1
            assert f" {run} is being trained by process {record['pid']} on " in said[0]
            assert (run / "config.yaml").read_text() == before
            pruned = dattrain("ckpt", "prune", run)
            assert pruned.returncode == 1 and f"by process {record['pid']}" in pruned.stderr
            assert dattrain("ckpt", "ls", run).returncode == 0
            assert "running" in dattrain("status", run).stdout
            # As when another took it while this one was suspended.
            (folder / "theirs").write_text(json.dumps({**record, "token": "theirs", "host": "elsewhere"}))
            (folder / "theirs").rename(run / "owner.json")
            assert first.wait(120) == 1
        finally:
            first.terminate()
    told = Path(log.name).read_text()
    assert f"dattrain train: {run}: process {record['pid']} on elsewhere" in told, told
    for rank in range(2):
        assert "has taken this run folder over" in (run / "logs" / f"rank_{rank}.log").read_text()
    steps = [row["step"] for row in rows(run)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) < 12000
    assert json.loads((run / "owner.json").read_text())["token"] == "theirs"


def test_a_finished_run_is_left_as_it_is_and_ends_cleanly(trained):
    before = (trained / "metrics.jsonl").read_text()
    done = dattrain("train", trained, "--nproc", 2)
    assert done.returncode == 0 and "finished at step 2 of 2" in done.stdout, done.stdout + done.stderr
    assert (trained / "metrics.jsonl").read_text() == before
    assert done.stderr == "loading torch, DeepSpeed ...\n"


def test_the_profile_has_a_trace_and_a_row_per_module(trained):
    import gzip

    for rank in range(2):
        trace = json.loads(gzip.decompress((trained / "profile" / f"rank_{rank}.trace.json.gz").read_bytes()))
        names = {event.get("name") for event in trace["traceEvents"]}
        assert "update 1" in names and "update 0" not in names
        table = {
            line.split()[0]: line.split()
            for line in (trained / "profile" / f"rank_{rank}.modules.txt").read_text().splitlines()[1:]
        }
        block = table["stages.0.blocks.0"]
        # Two micro-batches, and time forward and backward.
        assert block[1] == "2" and float(block[2]) > 0 and float(block[3]) > 0
        assert float(table["stages.0.blocks.0.attn"][2]) < float(block[2])
        # Two FLOPs for each of 2 calls x 8 images x 8 x 8 places x 32 x 128 multiply-accumulates, and what it moved.
        fc1 = table["stages.0.blocks.0.mlp.fc1"]
        assert float(fc1[6]) == pytest.approx(2 * 2 * 8 * 64 * 32 * 128 / 1e9, abs=6e-4)
        assert float(fc1[7]) > 0 and 0 < float(fc1[8].rstrip("%")) < 1000
        assert (
            "GFLOP/s (float32 matrix product)"
            in (trained / "profile" / f"rank_{rank}.modules.txt").read_text()
        )


@pytest.mark.parametrize("table", ["resize", "sample"])
def test_a_fine_tune_at_a_higher_resolution_says_what_became_of_every_tensor_and_resumes(
    home, trained, table
):
    folder, path, data = home
    run, whole = folder / f"tuned-{table}", folder / f"tuned-{table}-whole"
    settings = [*data[:1], *FP32, "model.img_size=64", "init.required=true", f"init.bias_table={table}"]
    source = f"init.from={trained}"
    steps = ["train.max_steps=2"]
    first = dattrain("train", path, *settings, source, "train.max_steps=1", "--run", run)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "tensors:" in first.stdout and "resized" in first.stdout and "EMA" in first.stdout
    assert ("read at the displacements" in first.stdout) == (table == "sample")
    again = dattrain("train", path, *settings, *steps, "--run", run)
    assert again.returncode == 0 and "tensors:" not in again.stdout, again.stdout + again.stderr
    assert dattrain("train", path, *settings, source, *steps, "--run", whole).returncode == 0
    assert curve(run) == curve(whole)
    assert_same(states(run, 2), states(whole, 2))


def test_a_linear_probe_under_zero_3_with_recomputation_moves_the_head_alone(home, trained):
    folder, path, data = home
    run = folder / "probe"
    settings = [
        *data[:1],
        "zero.stage=3",
        "train.precision=bf16",
        "train.activation_checkpointing=block",
        "optim.freeze_backbone=true",
    ]
    done = dattrain(
        "train", path, *settings, f"init.from={trained}", "train.max_steps=2", "--run", run, "--nproc", 2
    )
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = states(trained, 2), states(run, 2)
    moved = {
        k
        for k in after
        if k.startswith("param/") and not (after[k] == before[k.replace("param/", "ema/")]).all()
    }
    assert moved == {"param/head.fc.weight", "param/head.fc.bias"}


@pytest.mark.parametrize(
    "overrides, code, message",
    [
        (["train.global_batch=33", "augment.mix_prob=0"], 2, "train.global_batch=33 cannot be split over 2"),
        (["trian.seed=1"], 2, "unknown key trian"),
        (["data.train=/nowhere/at/all"], 1, "/nowhere/at/all"),
        (["init.from=/nowhere/at/all"], 1, "init.from=/nowhere/at/all"),
    ],
)
def test_a_mistake_gets_one_clear_message(home, overrides, code, message):
    folder, path, data = home
    done = dattrain("train", path, *data, *FP32, *overrides, "--run", folder / "mistake", "--nproc", 2)
    assert done.returncode == code, done.stderr
    told = [line for line in done.stderr.splitlines() if message in line]
    assert len(told) == 1 and "Traceback" not in done.stderr, done.stderr


def test_another_model_or_other_data_in_a_runs_folder_is_refused_and_loses_nothing(home, trained, tmp_path):
    _, path, data = home
    before = (trained / "config.yaml").read_text()
    done = dattrain("train", path, *data, *FP32, "model.name=dat_tiny", "--run", trained)
    assert (
        done.returncode == 2
        and "model.name=dat_atto (step_00000002), but this recipe says model.name=dat_tiny" in done.stderr
    )
    other = pack(tmp_path, train=64)
    done = dattrain("train", trained, other[0])
    assert done.returncode == 1 and "of 96 samples, now " in done.stderr
    assert (trained / "config.yaml").read_text() == before
    (trained / "config.yaml").write_text(before.replace("seed: 0", "seed: 1"))
    done = dattrain("train", trained)
    assert done.returncode == 2 and "config.yaml says train.seed=1" in done.stderr
    (trained / "config.yaml").write_text(before)
    assert dattrain("train", trained, data[0]).returncode == 0


def test_what_is_not_a_recipe_or_a_run_is_named(tmp_path):
    done = dattrain("train", tmp_path)
    assert done.returncode == 2 and "no config.yaml" in done.stderr
    done = dattrain("train", tmp_path / "missing.yaml")
    assert done.returncode == 2 and "no such config" in done.stderr


@pytest.mark.full
def test_worker_processes_end_cleanly_30_times_of_30(home):
    folder, path, data = home
    run = folder / "clean"
    settings = [*data[:1], "zero.stage=3", "train.precision=bf16"]
    for number in range(30):
        done = dattrain(
            "train", path, *settings, f"train.max_steps={1 + number % 2}", "--run", run, "--nproc", 2,
            run=subprocess.run,
        )  # fmt: skip
        assert done.returncode == 0 and done.stderr == "loading torch, DeepSpeed ...\n", (
            number,
            done.stdout,
            done.stderr,
        )


@pytest.mark.full
@pytest.mark.parametrize("unit", ["block", "stage"])
def test_compiled_training_follows_the_same_curve(home, trained, unit, monkeypatch):
    folder, path, data = home
    # Not the user's: a compiler that was killed leaves half a library there, which then cannot be loaded.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    run = folder / f"compiled-{unit}"
    settings = [*data, *FP32, "train.max_steps=2", f"train.compile={unit}"]
    done = dattrain("train", path, *settings, "--run", run, timeout=2400)
    assert done.returncode == 0 and "uncompiled" not in done.stdout, done.stdout + done.stderr
    assert [r["loss"] for r in rows(run)] == pytest.approx([r["loss"] for r in rows(trained)], rel=1e-4)


@pytest.mark.gpu
def test_cuda_graphs_follow_the_same_curve(home):
    folder, path, data = home
    curves = []
    for graphs in (False, True):
        run = folder / f"graphs-{graphs}"
        settings = [*data, *FP32, "train.max_steps=6", "train.compile=block", f"train.cuda_graphs={graphs}"]
        done = dattrain("train", path, *settings, "--run", run, timeout=2400)
        assert done.returncode == 0 and "run without" not in done.stdout, done.stdout + done.stderr
        curves.append([r["loss"] for r in rows(run)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
