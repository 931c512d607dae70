"""Told to end, killed, or cut off: the run goes on by itself and ends with the weights of an undisturbed one, bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import SAMPLES, STEPS, Site, losses, ranks, step_of, weights

from dattrain.submit.history import newest_checkpoint


def _begin(site: Site, name: str, *arguments: str, step: int = 12) -> tuple[Path, str]:
    """Submit to two nodes and wait until training is under way; the run and its job."""
    run = site.submit(name, "--nodes", "2", *arguments)
    site.wait_for(lambda: step_of(run) >= step, run=run)
    return run, site.status(run)["job"]


def _reasons(found: dict[str, Any]) -> list[str]:
    return [text.split("  ", 1)[1].split(":")[0] for text in found["restarts"]]


def _same(run: Path, undisturbed: Path) -> None:
    assert losses(run) == losses(undisturbed)
    assert weights(run) == weights(undisturbed)


def test_a_signal_to_one_rank_and_then_a_nodes_power_cut(site: Site, undisturbed: Path) -> None:
    """The rank is not the first."""
    run, job = _begin(site, "usr2-and-power")
    os.kill(ranks(job)[2], signal.SIGUSR2)
    begins = site.wait_for(
        lambda: b if len(b := [e for e in _history(run) if e["event"] == "begin"]) == 2 else None, run=run
    )
    saved = begins[1]["checkpoint"]
    # The shards of all four ranks, at the very step where they agreed.
    assert len(weights(run, saved)) == 4
    site.wait_for(lambda: (newest_checkpoint(run) or 0) > saved, run=run)
    lost = begins[1]["nodes"][-1]
    site.cluster.power_cut(lost)
    try:
        found = site.wait(run)
    finally:
        site.cluster.power_on(lost)
    assert _reasons(found) == ["preempted", "node failure"]
    assert f"saved at step {saved}," in found["restarts"][0] and f"{lost} went down" in found["restarts"][1]
    attempts = [e for e in _history(run) if e["event"] == "begin"]
    assert lost not in attempts[2]["nodes"] and attempts[2]["checkpoint"] > saved
    _same(run, undisturbed)


@pytest.mark.full
@pytest.mark.parametrize(
    ("partition", "requeue"),
    # spot0: PreemptMode=CANCEL and no GraceTime, after which Slurm starts nothing again.
    [("main", "scontrol"), ("main", "follow-up"), ("spot0", "scontrol"), ("spot0", "follow-up")],
)
def test_preempted_by_a_more_urgent_job(site: Site, undisturbed: Path, partition: str, requeue: str) -> None:
    profile = site.folder / f"{partition}-{requeue}.yaml"
    text = site.profile.read_text().replace("partition: main", f"partition: {partition}")
    profile.write_text(text + f"requeue: {requeue}\n")
    run, _ = _begin(site, f"preempted-{partition}-{requeue}", "--cluster", str(profile))
    site.cluster.run(
        "sbatch", "-p", "urgent", "-N4", "--exclusive", "-t", "1", "-o", "/dev/null", "--wrap", "sleep 3"
    )
    found = site.wait(run)
    assert _reasons(found) == ["preempted"]
    _same(run, undisturbed)


@pytest.mark.full
def test_the_time_limit(site: Site, undisturbed: Path) -> None:
    run, job = _begin(site, "limit", "--time", "3")
    # One slow rank keeps the run from finishing within its limit; Slurm wakes it with the signal.
    os.kill(ranks(job)[1], signal.SIGSTOP)
    assert set(_reasons(site.wait(run))) == {"time limit"}
    _same(run, undisturbed)


@pytest.mark.full
def test_a_save_that_outruns_the_time_limit_is_requeued_all_the_same(site: Site, undisturbed: Path) -> None:
    run, job = _begin(site, "overrun", "--time", "3")
    stuck, deadline = ranks(job)[1], time.monotonic() + 600
    # Again and again, since Slurm wakes what it signals.
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(stuck, signal.SIGSTOP)
            time.sleep(0.002)
    found = site.wait(run)
    assert set(_reasons(found)) == {"time limit"}
    assert "killed before it had saved" in found["restarts"][0]
    _same(run, undisturbed)


@pytest.mark.full
@pytest.mark.parametrize("requeue", ["scontrol", "follow-up"])
def test_the_power_of_the_node_of_the_batch_script_is_cut(
    site: Site, undisturbed: Path, requeue: str
) -> None:
    profile = site.folder / f"cut-{requeue}.yaml"
    profile.write_text(site.profile.read_text() + f"requeue: {requeue}\n")
    run, job = _begin(site, f"power-{requeue}", "--cluster", str(profile))
    nodes = site.cluster.run("squeue", "-h", "-j", job, "-o", "%N").strip()
    lost = site.cluster.run("scontrol", "show", "hostnames", nodes).split()[0]
    site.cluster.power_cut(lost)
    try:
        found = site.wait(run)
    finally:
        site.cluster.power_on(lost)
    assert _reasons(found) == ["node failure"]
    _same(run, undisturbed)


@pytest.mark.full
def test_a_killed_rank_takes_the_job_down_and_is_retried(site: Site, undisturbed: Path) -> None:
    run, job = _begin(site, "killed")
    os.kill(ranks(job)[3], signal.SIGKILL)
    found = site.wait(run)
    assert _reasons(found) == ["crashed"]
    (end, _) = [e for e in _history(run) if e["event"] == "end"]
    assert end["detail"] == "Killed"
    assert end["node"] == next(e for e in _history(run) if e["event"] == "begin")["nodes"][1]
    _same(run, undisturbed)


def test_a_node_that_fails_twice_is_left_out_and_without_progress_the_run_ends(site: Site) -> None:
    profile = site.folder / "one-task.yaml"
    profile.write_text(site.profile.read_text().replace("tasks_per_node: 2", "tasks_per_node: 1"))
    run, job = _begin(site, "bad-node", "--retries", "5", "--cluster", str(profile))
    bad = next(e for e in _history(run) if e["event"] == "begin")["nodes"][1]
    os.kill(ranks(job)[1], signal.SIGKILL)

    def second_has_saved() -> bool:
        begins = [e for e in _history(run) if e["event"] == "begin"]
        return len(begins) == 2 and (newest_checkpoint(run) or 0) > begins[1]["checkpoint"]

    site.wait_for(second_has_saved, run=run)
    os.kill(ranks(site.status(run)["job"])[1], signal.SIGKILL)
    begins = site.wait_for(
        lambda: b if len(b := [e for e in _history(run) if e["event"] == "begin"]) == 3 else None, run=run
    )
    assert bad not in begins[2]["nodes"]
    assert begins[2]["job"] != job
    # A third time, before it could publish anything new.
    found = site.wait_for(lambda: ranks(begins[2]["job"]).get(1), run=run)
    os.kill(found, signal.SIGKILL)
    shown = site.wait(run, "failed")
    assert "without having published a new checkpoint" in shown["why"]
    assert f"without {bad} from now on" in shown["restarts"][1]


@pytest.mark.full
def test_nodes_are_taken_and_added_between_restarts(site: Site) -> None:
    run, _ = _begin(site, "elastic")
    for nodes, step in (("1", 28), ("2", None)):
        site.dattrain("stop", str(run))
        site.wait(run, "stopped")
        site.dattrain("submit", str(run), "--cluster", str(site.profile), "--nodes", nodes)
        if step is not None:
            site.wait_for(lambda: step_of(run) >= 28, run=run)
    site.wait(run)
    starts = json.loads((run / "env.json").read_text())["starts"]
    assert [start["world"] for start in starts] == [4, 2, 4]
    assert list(losses(run)) == list(range(1, STEPS + 1))
    seen = _samples(run)
    assert set(seen.values()) == {STEPS * 32 // SAMPLES}
    assert len(seen) == SAMPLES


def _samples(run: Path) -> Counter[tuple[int, int]]:
    """How often the ranks took each (shard, sample), attempt by attempt, by the world size that each attempt had."""
    from dattrain.config.load import load
    from dattrain.data.order import Order

    config = load(run / "config.yaml").config
    order = Order(
        [64] * (SAMPLES // 64), seed=config.train.seed, lanes=config.data.lanes, window=config.data.window
    )
    worlds = [start["world"] for start in json.loads((run / "env.json").read_text())["starts"]]
    begins = [e["checkpoint"] or 0 for e in _history(run) if e["event"] == "begin"]
    seen: Counter[tuple[int, int]] = Counter()
    for world, first, last in zip(worlds, begins, [*begins[1:], STEPS]):
        for step in range(first, last):
            for rank in range(world):
                shards, samples = order.locate(order.rank_positions(step * 32, 32, rank, world))
                seen.update(zip(shards.tolist(), samples.tolist()))
    return seen


@pytest.mark.full
def test_cancel_ends_it_and_nothing_starts_it_again(site: Site) -> None:
    run, job = _begin(site, "cancelled", step=1)
    site.dattrain("cancel", str(run))
    assert site.wait(run, "cancelled")["job"] == job
    site.wait_for(
        lambda: not site.cluster.run("squeue", "-h", "-j", job, "-t", "PD,R,CG", check=False).strip(), run=run
    )
    assert site.status(run)["state"] == "cancelled"


def _history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "submit" / "history.jsonl").read_text().splitlines()]
