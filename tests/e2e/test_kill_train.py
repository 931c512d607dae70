"""SIGKILL at random moments, started again each time: the end is that of the run that was never killed, bit for bit."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import warm

sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))
from state_ranks import assert_same, states
from train_worker import curve, pack, recipe, rows

STEPS = 10
SETTINGS = [
    "zero.stage=2",
    "train.precision=bf16",
    "data.workers=1",
    "checkpoint.every_steps=2",
    f"train.max_steps={STEPS}",
    "schedule.epochs=6",
    "eval.every_epochs=1",
]


def start(path, run, data):
    command = [
        sys.executable,
        "-m",
        "dattrain",
        "train",
        str(path),
        *data,
        *SETTINGS,
        "--run",
        str(run),
        "--nproc",
        "2",
    ]
    log = open(run.parent / f"{run.name}.log", "a")  # noqa: SIM115
    return warm.Popen(command, stdout=log, stderr=log, start_new_session=True)


def ranks_of(launcher):
    """Pids of the launcher's ranks."""
    try:
        return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]
    except FileNotFoundError:
        return []


def tail(run):
    return (run.parent / f"{run.name}.log").read_text()[-3000:]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    data, path = pack(folder), recipe(folder)
    run = folder / "whole"
    warm.run([sys.executable, "-c", ""])  # Its first start takes longer.
    begin = time.monotonic()
    assert start(path, run, data).wait(600) == 0, tail(run)
    return folder, path, data, time.monotonic() - begin


def survive(undisturbed, kills, seed):
    folder, path, data, duration = undisturbed
    whole, run = folder / "whole", folder / f"killed-{seed}"
    draw = random.Random(seed)
    for number in range(kills):
        process = start(path, run, data)
        # Anywhere from the imports to the end; later attempts begin nearer to the end.
        wait = draw.uniform(0.2, 1.1) * duration
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        victims = ranks_of(process.pid)
        if number % 2 and victims:
            # One rank alone: the launcher must end the others.
            os.kill(draw.choice(victims), signal.SIGKILL)
            process.wait(120)
        elif process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        while any(Path(f"/proc/{pid}").exists() for pid in victims):
            time.sleep(0.02)
    assert start(path, run, data).wait(600) == 0, tail(run)
    assert curve(run) == curve(whole)
    assert_same(states(run, STEPS), states(whole, STEPS))
    assert [(r["step"], r["top1"]) for r in rows(run, "top1")] == [
        (r["step"], r["top1"]) for r in rows(whole, "top1")
    ]


def test_killed_twice(undisturbed):
    survive(undisturbed, 2, seed=1)


@pytest.mark.full
def test_killed_ten_times(undisturbed):
    survive(undisturbed, 10, seed=2)
