import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dattrain.clock import Stopwatch
from dattrain.runtime import health
from dattrain.runtime.health import STALLED, Action, NonFinitePolicy, Watchdog

G, S, R, X = Action.NONE, Action.SKIP, Action.ROLL_BACK, Action.STOP


@pytest.mark.parametrize(
    "finite, expected",
    [
        ("111", [G, G, G]),
        ("0101", [S, G, S, G]),
        ("000", [S, S, R]),
        ("000000", [S, S, R, S, S, R]),
        ("000000000", [S, S, R, S, S, R, S, S, X]),
        ("0001000", [S, S, R, G, S, S, R]),
    ],
)
def test_what_follows_updates_that_are_not_finite(finite, expected):
    policy = NonFinitePolicy(max_bad_steps=3, max_rollbacks=2)
    assert [policy.decide(step == "1").action for step in finite] == expected
    assert policy.total == finite.count("0")


def test_a_restart_does_not_forgive():
    policy = NonFinitePolicy(2, 1)
    for _ in range(3):
        policy.decide(False)
    other = NonFinitePolicy(2, 1)
    other.restore(json.loads(json.dumps(policy.state())))
    assert other.decide(False).action is X


def watch(tmp_path, rank, limit, codes):
    (tmp_path / "logs").mkdir(exist_ok=True)
    file = open(tmp_path / "logs" / f"rank_{rank}.log", "a", buffering=1)  # noqa: SIM115
    ended = threading.Event()

    def ended_with(code):
        codes.append((rank, code))
        ended.set()

    dog = Watchdog(limit, tmp_path, file, rank, f"node{rank}", exit=ended_with, notice_s=0.2)
    return dog, ended


def test_a_stall_dumps_the_stacks_of_every_rank_and_names_who_was_silent(tmp_path, capfd):
    codes = []
    stalled, ended = watch(tmp_path, 1, 0.3, codes)
    waiting, other_ended = watch(tmp_path, 0, 600.0, codes)
    stalled.attempt = waiting.attempt = "this"
    waiting.beat("waiting for the other ranks")
    stalled.beat("reading and updating")
    stalled.start()
    waiting.start()
    assert ended.wait(20) and other_ended.wait(20)
    assert sorted(codes) == [(0, STALLED), (1, STALLED)]
    marker = json.loads((tmp_path / "logs" / "stalled.json").read_text())
    assert marker["rank"] == 1 and marker["place"] == "reading and updating"
    for rank in range(2):
        assert "most recent call first" in (tmp_path / "logs" / f"rank_{rank}.log").read_text()
    assert "rank 1 on node1 was silent" in capfd.readouterr().err
    for dog in (stalled, waiting):
        dog.close()


def test_a_rank_that_beats_is_left_alone(tmp_path):
    codes = []
    dog, ended = watch(tmp_path, 0, 0.5, codes)
    dog.start()
    for _ in range(15):
        dog.beat("updating")
        time.sleep(0.05)
    dog.close()
    assert not ended.is_set() and not codes


def test_a_thousand_ranks_look_for_a_marker_no_more_often_than_256_and_soon_enough():
    pauses = {world: health.pause(world, 1800, health.GRACE_S) for world in (1, 256, 1024, 4096)}
    assert pauses[1] == pauses[256] == 1.0 and 1024 / pauses[1024] <= 256
    assert max(pauses.values()) < health.GRACE_S / 2, (
        "or a stall ends the process before the others have seen it"
    )


@pytest.mark.parametrize("attempt", ["now", "before"])
def test_the_marker_of_another_attempt_means_nothing_whatever_its_clock_says(tmp_path, attempt):
    codes = []
    (tmp_path / "logs").mkdir()
    marker = tmp_path / "logs" / "stalled.json"
    marker.write_text(json.dumps({"rank": 1, "host": "x", "place": "y", "silent_s": 1, "attempt": attempt}))
    os.utime(marker, (1, 1) if attempt == "now" else (1 << 32, 1 << 32))
    dog, ended = watch(tmp_path, 0, 10.0, codes)
    dog.attempt = "now"
    dog.start()
    assert ended.wait(20 if attempt == "now" else 1.5) == (attempt == "now")
    dog.close()


def test_what_a_process_slept_through_does_not_count():
    now = [0.0]
    watch = Stopwatch(5.0, lambda: now[0])
    for gap, seconds in ((1, 1), (3, 4), (3600, 9), (2, 11)):
        now[0] += gap
        assert watch.look() == seconds
    assert watch.pauses() == 3595
    watch.reset()
    assert (watch.look(), watch.pauses()) == (0, 0)


CHILD = """
import faulthandler, pathlib, sys, threading, time
from dattrain.runtime import health
folder = pathlib.Path(sys.argv[1])
health._TICK_S = 0.3
file = open(folder / "rank_0.log", "a", buffering=1)
faulthandler.enable(file)
dog = health.Watchdog(0.6, folder, file, 0, "node0", notice_s=0.0)
dog.start()
dog.beat("updating")
if sys.argv[2] == "gil":
    import ctypes  # PyDLL does not let go of the GIL
    print("up", flush=True)
    ctypes.PyDLL(None).sleep(300)
else:
    import os  # a data worker, which holds all that its parent had open
    if sys.argv[2] == "forked" and not os.fork():
        time.sleep(60)
        os._exit(0)
    print("up", flush=True)
    while True:
        dog.beat("updating")
        time.sleep(0.1)
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    started = []

    def start(kind, patience):
        code = CHILD.replace("dog.start()", f"dog.start(grace_s={patience})")
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), kind], stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b"up\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_call_that_keeps_the_gil_ends_with_the_stacks_written(tmp_path, child):
    process = child("gil", 0.2)
    assert process.wait(timeout=30) == -signal.SIGABRT
    assert "most recent call first" in (tmp_path / "rank_0.log").read_text()
    assert "GIL" in json.loads((tmp_path / "logs" / "stalled.json").read_text())["place"]


def test_a_process_that_was_stopped_for_long_is_not_stalled(tmp_path, child):
    process = child("suspended", 0.2)
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)  # five times the limit, and twice that of the process beside it
    process.send_signal(signal.SIGCONT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1.5)
    assert not (tmp_path / "logs" / "stalled.json").exists()


def test_the_process_beside_one_that_was_killed_ends_though_a_data_worker_outlives_it(tmp_path, child):
    process = child("forked", 300)
    beside = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (helper,) = [p for p in beside if "RLIMIT_CORE" in Path(f"/proc/{p}/cmdline").read_text()]
    (worker,) = set(beside) - {helper}
    process.kill()
    process.wait()
    try:
        deadline = time.monotonic() + 60
        while Path(f"/proc/{helper}/cmdline").exists() and Path(f"/proc/{helper}/cmdline").read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert Path(f"/proc/{worker}/cmdline").read_bytes()
    finally:
        os.kill(int(worker), signal.SIGKILL)


def test_one_that_cannot_start_its_process_watches_alone(tmp_path, monkeypatch, caplog):
    (tmp_path / "python").touch()
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with open(tmp_path / "log", "w") as file:
        dog = Watchdog(60, tmp_path, file, 0, "node0").start()
        dog.beat("updating")
        dog.close()
    assert f"{tmp_path}/python (EACCES: Permission denied)" in caplog.text
