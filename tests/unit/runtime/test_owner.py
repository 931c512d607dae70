"""One owner per folder, with real processes that are killed and suspended, and with copied and moved folders."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dattrain.errors import UserError
from dattrain.runtime import claims, owner, process
from dattrain.runtime.owner import InUse

BEAT_S, SILENCE_S = 0.05, 0.8
CONTENDER = f"""
import sys
from pathlib import Path
from dattrain.runtime import owner, process

folder, machine, silence = sys.argv[1:]
if machine:
    process.boot_id = lambda: machine
try:
    mine = owner.acquire(Path(folder), heartbeat_s={BEAT_S}, timeout_s=float(silence))
except owner.InUse as error:
    sys.exit(f"held: {{error}}")
print("taken", flush=True)
for line in sys.stdin:
    if line == "release\\n":
        mine.release()
    try:
        mine.confirm()
        print("mine", mine.lost, flush=True)
    except owner.InUse as error:
        print("lost", mine.lost, error, flush=True)
"""


class Contender:
    """A process that wants a folder. What asks for ``timeout_s`` of an hour must not wait for it."""

    def __init__(self, folder: Path, machine: str = "", timeout_s: float = 3600) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CONTENDER, str(folder), machine, str(timeout_s)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "SLURM_JOB_ID": "45"},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.first = self.process.stdout.readline().strip()

    def ask(self, word: str = "?") -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def said(self) -> str:
        assert self.process.stderr is not None
        self.process.wait()
        return self.process.stderr.read()

    def end(self, signum: int = signal.SIGKILL) -> None:
        self.process.send_signal(signum)
        self.process.wait()


@pytest.fixture
def start() -> Iterator[Callable[..., Contender]]:
    """Start contenders; they are ended afterwards."""
    started = []

    def begin(*arguments: Any, **keywords: Any) -> Contender:
        started.append(Contender(*arguments, **keywords))
        return started[-1]

    yield begin
    for one in started:
        one.process.kill()
        one.process.communicate()


def take(folder: Path, **keywords: Any) -> owner.Owner:
    return owner.acquire(folder, **{"heartbeat_s": BEAT_S, "timeout_s": 3600, **keywords})


def elsewhere(monkeypatch: pytest.MonkeyPatch, machine: str = "another") -> None:
    """From here on this process is one of another machine."""
    monkeypatch.setattr("dattrain.runtime.process.boot_id", lambda: machine)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_second_one_is_refused_with_who_has_it_and_then_has_it(tmp_path, start):
    first = start(tmp_path)
    with pytest.raises(InUse) as refused:
        take(tmp_path)
    said = str(refused.value)
    assert f"{tmp_path} is being trained by process {first.process.pid} on " in said
    assert "(Slurm job 45) since 20" in said and f"touch {tmp_path}/stop" in said and "another --run" in said
    assert first.ask() == "mine False"
    assert first.ask("release").startswith("lost")
    assert files(tmp_path) == []
    with take(tmp_path) as mine:
        mine.confirm()
        with pytest.raises(InUse):
            take(tmp_path)  # twice at once in one process
    with take(tmp_path):  # and twice in turn
        pass
    assert files(tmp_path) == []


def test_a_killed_one_is_followed_at_once_on_its_machine(tmp_path, start):
    start(tmp_path).end()
    assert files(tmp_path) == ["owner.json"]
    assert owner.current_owner(tmp_path) is None
    with take(tmp_path) as mine:
        mine.confirm()
        assert files(tmp_path) == ["owner.json"]


def test_a_number_that_another_process_has_now_is_no_owner(tmp_path, start):
    start(tmp_path).end()
    path = tmp_path / "owner.json"
    with open(path, "r+") as file:  # the file stays, with its inode
        text = file.read().replace(f'"pid": {json.loads(path.read_text())["pid"]}', f'"pid": {os.getpid()}')
        file.seek(0)
        file.truncate()
        file.write(text)
    take(tmp_path).release()


def test_elsewhere_only_silence_tells(tmp_path, start, monkeypatch, caplog):
    first = start(tmp_path)
    elsewhere(monkeypatch)
    with pytest.raises(InUse, match=f"process {first.process.pid}"):
        take(tmp_path)
    with pytest.raises(InUse):
        owner.refuse_if_in_use(tmp_path)
    caplog.clear()
    first.end()
    begin = time.monotonic()
    owner.refuse_if_in_use(tmp_path, patience_s=0.1)
    with take(tmp_path, timeout_s=SILENCE_S):
        assert time.monotonic() - begin >= SILENCE_S
    (line,) = caplog.messages
    assert f"waiting up to 1 s: process {first.process.pid} on " in line and str(tmp_path) in line


def test_who_is_asked_to_end_does_not_wait(tmp_path, start, monkeypatch):
    start(tmp_path).end()
    elsewhere(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        take(tmp_path, give_up=lambda: True)


def test_a_suspended_one_is_named_on_its_machine(tmp_path, start):
    first = start(tmp_path)
    first.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, first.process.pid, os.WSTOPPED | os.WNOWAIT)
    with pytest.raises(InUse, match=f"suspended: let it continue .kill -CONT {first.process.pid}"):
        take(tmp_path)


@pytest.mark.parametrize("successor_ended", [False, True])
def test_a_suspended_one_that_was_followed_writes_no_more(tmp_path, start, successor_ended):
    first = start(tmp_path, timeout_s=SILENCE_S)
    first.process.send_signal(signal.SIGSTOP)
    second = start(tmp_path, "another", SILENCE_S)
    assert second.first == "taken"
    if successor_ended:
        second.ask("release")
    first.process.send_signal(signal.SIGCONT)
    said = first.ask()
    assert said.startswith("lost True") and "this process ends, and writes nothing more there" in said
    assert successor_ended or f"process {second.process.pid} on " in said
    first.ask("release")
    if successor_ended:
        assert files(tmp_path) == []
    else:
        assert second.ask() == "mine False"


def test_a_copy_has_no_owner_and_a_moved_folder_still_has(tmp_path, start):
    first = start(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert owner.current_owner(tmp_path / "copy") is None
    with take(tmp_path / "copy") as mine:
        mine.confirm()
        assert first.ask() == "mine False"
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(InUse, match=f"process {first.process.pid}"):
        take(tmp_path / "moved")
    (tmp_path / "run").symlink_to("moved")
    assert first.ask() == "mine False"
    (tmp_path / "run").unlink()
    first.end()
    take(tmp_path / "moved").release()


def test_what_slurm_has_requeued_follows_itself(tmp_path, start, monkeypatch):
    first = start(tmp_path)
    elsewhere(monkeypatch)
    monkeypatch.setenv("SLURM_JOB_ID", "46")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(InUse):
        take(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "45")
    with take(tmp_path):
        assert first.ask().startswith("lost True")


EDITS = [
    {"token": "../../x"},
    {"token": "a" * 300},
    {"token": 5},
    {"restart": "x", "job": "45"},
    {"pid": "7"},
    {"folder": ["/"]},
]


def test_what_is_no_record_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "45")
    record = asdict(claims.own_record(tmp_path))
    texts = ["", "[" * 100_000, *(json.dumps(record | edit) for edit in EDITS)]
    for text in texts:
        assert claims.parse(text.encode()) is None
    assert claims.parse(json.dumps(record | {"new": 1}).encode()) == claims.Record(**record)
    (tmp_path / "owner.json").write_text(texts[2])
    with take(tmp_path, timeout_s=0.1) as mine:
        mine.confirm()
    (tmp_path / "owner.json").symlink_to("nowhere")
    with take(tmp_path, timeout_s=0.1) as mine:
        mine.confirm()
    assert files(tmp_path) == []
    (tmp_path / "owner.json").mkdir()
    for asked in (owner.current_owner, owner.refuse_if_in_use, take):
        with pytest.raises(UserError, match=r"owner\.json: cannot be read, .*: Is a directory"):
            asked(tmp_path)


def test_a_process_that_proc_hides_may_live(tmp_path, start, monkeypatch):
    start(tmp_path)
    monkeypatch.setattr("dattrain.runtime.process._stat", lambda _: None)
    assert owner.current_owner(tmp_path) is None  # it is ours, so it would be shown
    monkeypatch.setattr("os.kill", _not_ours)
    with pytest.raises(InUse):
        take(tmp_path)


def _not_ours(*_: Any) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_on_a_full_disk_one_lets_go_all_the_same(tmp_path, monkeypatch):
    mine = take(tmp_path)
    monkeypatch.setattr("dattrain.runtime.claims._write", _full)
    mine.release()
    assert files(tmp_path) == []
    monkeypatch.setattr("os.link", _not_ours)
    with pytest.raises(UserError, match="No space left"):
        take(tmp_path)
    assert files(tmp_path) == []


def _full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_folder_that_is_gone_is_said(tmp_path, caplog):
    with take(tmp_path / "run", timeout_s=0.2) as mine:
        (tmp_path / "run").rename(tmp_path / "moved")
        while not mine.lost:
            time.sleep(0.01)
        with pytest.raises(InUse, match="run has not been there for more than 0 s: it was moved or removed"):
            mine.confirm()
    with take(tmp_path / "other") as mine:
        (tmp_path / "other").rename(tmp_path / "away")
        with pytest.raises(OSError):
            mine.confirm()
        (tmp_path / "other").mkdir()
        mine.confirm()
    assert "other/owner.json was not there any more, and is put back" in caplog.text


def test_a_file_removed_or_emptied_by_hand_is_put_back(tmp_path):
    with take(tmp_path) as mine:
        for spoil in (Path.unlink, lambda path: path.write_text("")):
            spoil(tmp_path / "owner.json")
            mine.confirm()
            assert json.loads((tmp_path / "owner.json").read_text())["token"] == mine.record.token
    assert files(tmp_path) == []


def test_a_fork_does_not_let_go(tmp_path):
    with take(tmp_path) as mine:
        child = os.fork()
        if child == 0:
            mine.release()
            os._exit(0)
        os.waitpid(child, 0)
        mine.confirm()
        assert files(tmp_path) == ["owner.json"]


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/run: the run folder cannot be written: Not a directory"):
        take(tmp_path / "file" / "run")


@pytest.mark.parametrize("links", [True, False])
def test_of_many_one_follows_a_dead_one(tmp_path, links, monkeypatch):
    if not links:
        monkeypatch.setattr("os.link", _not_ours)
    path = tmp_path / "owner.json"
    dead = replace(claims.own_record(tmp_path, "trained"), pid=1 << 30)
    for _ in range(10):
        assert claims.create(path, dead)
        won: list[owner.Owner] = []
        gate = threading.Barrier(6)

        def contend(won: list[owner.Owner] = won, gate: threading.Barrier = gate) -> None:
            gate.wait()
            with contextlib.suppress(InUse):
                won.append(take(tmp_path, heartbeat_s=60))

        threads = [threading.Thread(target=contend) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (one,) = won
        one.confirm()
        one.release()
        assert files(tmp_path) == []


def test_a_link_whose_answer_was_lost_counts(tmp_path, monkeypatch):
    link = os.link

    def twice(*paths: Path) -> None:
        link(*paths)
        link(*paths)

    monkeypatch.setattr("os.link", twice)
    take(tmp_path).release()


@pytest.mark.parametrize("turn", ["before", "after"])
@pytest.mark.parametrize("at", ["create", "read", "replace", "holds"])
def test_one_that_is_suspended_while_it_follows_is_followed_itself(tmp_path, at, turn, monkeypatch):
    path = tmp_path / "owner.json"
    slow, fast = claims.own_record(tmp_path), claims.own_record(tmp_path)
    assert claims.create(path, replace(claims.own_record(tmp_path), pid=1 << 30))
    where = os if at == "replace" else claims
    step = getattr(where, at)

    def suspended(*arguments: Any) -> Any:
        """The first of these steps, with all that the other one does before or after it."""
        monkeypatch.setattr(where, at, step)
        if turn == "before":
            claims.take_over(path, claims.claim_chain(path), fast)
        done = step(*arguments)
        if turn == "after":
            claims.take_over(path, claims.claim_chain(path), fast)
        return done

    chain = claims.claim_chain(path)
    monkeypatch.setattr(where, at, suspended)
    slow_won = claims.take_over(path, chain, slow)
    # Which of the two does not matter; but one has it, and the other does not believe that it has.
    assert claims.holds(path, slow) != claims.holds(path, fast)
    last_look = (at, turn) == ("holds", "after")  # what comes later, ``confirm`` finds
    assert slow_won == claims.holds(path, slow) or last_look
    assert files(tmp_path) == ["owner.json"]


def test_a_process_lives_as_long_as_one_of_its_threads(tmp_path):
    code = "import ctypes, threading; threading.Thread(target=input).start(); ctypes.CDLL(None).pthread_exit(None)"
    one = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    while (fields := process._stat(one.pid)) is not None and fields[0] != "Z":
        time.sleep(0.01)
    assert fields is not None and process.start_time(one.pid) == fields[19]
    one.kill()
    os.waitid(os.P_PID, one.pid, os.WEXITED | os.WNOWAIT)
    assert process.start_time(one.pid) is None
    one.communicate()
