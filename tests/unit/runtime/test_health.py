import json
import threading
import time

import pytest

from dattrain.runtime.health import STALLED, Verdict, Verdicts, Watchdog

G, S, R, X = Verdict.GOOD, Verdict.SKIP, Verdict.ROLL_BACK, Verdict.STOP


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
def test_verdicts(finite, expected):
    verdicts = Verdicts(max_bad_steps=3, max_rollbacks=2)
    assert [verdicts.judge(step == "1") for step in finite] == expected
    assert verdicts.total == finite.count("0")


def test_a_restart_does_not_forgive():
    verdicts = Verdicts(2, 1)
    for _ in range(3):
        verdicts.judge(False)
    other = Verdicts(2, 1)
    other.restore(json.loads(json.dumps(verdicts.state())))
    assert other.judge(False) is X


def watch(tmp_path, rank, limit, codes):
    (tmp_path / "logs").mkdir(exist_ok=True)
    file = open(tmp_path / "logs" / f"rank_{rank}.log", "a", buffering=1)  # noqa: SIM115
    ended = threading.Event()

    def leave(code):
        codes.append((rank, code))
        ended.set()

    dog = Watchdog(limit, tmp_path, file, rank, f"node{rank}", exit=leave, notice_s=0.2)
    return dog, ended


def test_a_stall_dumps_the_stacks_of_every_rank_and_names_who_was_silent(tmp_path, capfd):
    codes = []
    stalled, ended = watch(tmp_path, 1, 0.3, codes)
    waiting, other_ended = watch(tmp_path, 0, 600.0, codes)
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
        dog.step()
        time.sleep(0.05)
    dog.close()
    assert not ended.is_set() and not codes


def test_the_marker_of_an_attempt_before_this_one_means_nothing(tmp_path):
    import os

    codes = []
    (tmp_path / "logs").mkdir()
    old = tmp_path / "logs" / "stalled.json"
    old.write_text(json.dumps({"rank": 1, "host": "x", "place": "y", "silent_s": 1}))
    os.utime(old, (1, 1))
    dog, ended = watch(tmp_path, 0, 100.0, codes)
    dog.start()
    time.sleep(1.3)
    dog.close()
    assert not ended.is_set()
