"""Training through Slurm: the same curve as anywhere else, in an array, and on devices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import STEPS, Site, losses, weights


def test_two_nodes_of_two_tasks_train_to_the_curve_of_four_local_processes(
    site: Site, undisturbed: Path
) -> None:
    local = site.folder / "local.yaml"
    local.write_text("kind: local\ntasks_per_node: 4\ntime: '30'\nenvironment: {OMP_NUM_THREADS: 1}\n")
    run = site.submit("local", "--cluster", str(local))
    site.wait(run)
    assert losses(run) == losses(undisturbed)
    assert list(losses(run)) == list(range(1, STEPS + 1))
    assert weights(run) == weights(undisturbed)


def test_the_run_folder_holds_what_ran(site: Site, undisturbed: Path) -> None:
    code = json.loads((undisturbed / "code.json").read_text())
    assert (undisturbed / code["snapshot"] / "dattrain" / "engine" / "trainer.py").is_file()
    assert len(code["sha256"]) == 64
    starts = json.loads((undisturbed / "env.json").read_text())["starts"]
    assert [(start["world"], start["launcher"]) for start in starts] == [(4, "slurm")]
    (script,) = (undisturbed / "submit" / "slurm").glob("*_submission.sh")
    shown = site.dattrain(
        "submit",
        str(site.recipe),
        "--cluster",
        str(site.profile),
        "--run",
        "runs/undisturbed",
        "--nodes",
        "2",
        "--dry-run",
    )
    assert script.read_text().rstrip() in shown.stdout


def test_logs_of_each_rank(site: Site, undisturbed: Path) -> None:
    assert f"step {STEPS}/{STEPS}" in site.dattrain("logs", str(undisturbed)).stdout
    assert "r3@" in site.dattrain("logs", str(undisturbed), "--rank", "3").stdout
    job = site.dattrain("logs", str(undisturbed), "--job", "-n", "0").stdout
    assert "dattrain: finished" in job
    refused = site.dattrain("logs", str(undisturbed), "--rank", "9", check=False)
    assert refused.returncode == 1
    assert "rank 9" in refused.stderr


@pytest.mark.full
@pytest.mark.parametrize("visibility", ["all", "one"])
def test_with_one_or_with_all_devices_visible(site: Site, undisturbed: Path, visibility: str) -> None:
    profile = site.folder / f"gpu-{visibility}.yaml"
    profile.write_text(
        site.profile.read_text().replace("tasks_per_node: 2", "gpus_per_node: 2")
        + f"gpu_visibility: {visibility}\n"
    )
    run = site.submit(f"gpu-{visibility}", "--nodes", "2", "--cluster", str(profile))
    site.wait(run)
    assert weights(run) == weights(undisturbed)


@pytest.mark.full
def test_an_array_of_three_learning_rates_is_three_runs(site: Site) -> None:
    root = site.submit("rates", "--nodes", "1", "--array", "optim.lr=1e-3,5e-4,1e-4", "train.micro_batch=16")
    runs = [root / f"optim.lr={value}" for value in ("1e-3", "5e-4", "1e-4")]
    for run in runs:
        site.wait(run)
    shown = site.dattrain("status", str(root)).stdout
    assert shown.count("finished") == 3
    assert len({json.dumps(losses(run)) for run in runs}) == 3
