import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from dattrain.errors import REQUEUE
from dattrain.runtime import spawn
from dattrain.runtime.spawn import launch


def script(tmp_path, body):
    path = tmp_path / "rank.py"
    path.write_text("import os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + textwrap.dedent(body))
    return [sys.executable, str(path)]


@pytest.mark.parametrize(
    "body, code",
    [
        ("assert os.environ['WORLD_SIZE'] == '2' and os.environ['MASTER_PORT']", 0),
        (f"sys.exit({REQUEUE})", REQUEUE),
        (f"sys.exit({REQUEUE} if rank else 0)", REQUEUE),
        ("sys.exit(2)", 2),
    ],
)
def test_exit_codes(tmp_path, body, code):
    assert launch(script(tmp_path, body), 2) == code


def test_a_rank_that_dies_takes_the_others_down(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("dattrain.runtime.spawn.GRACE_S", 0.2)
    body = "open(f'{sys.argv[0]}.{rank}', 'w').write(str(os.getpid()))\nif rank == 1: os.kill(os.getpid(), 9)\ntime.sleep(600)"
    assert launch(script(tmp_path, body), 2) == 128 + 9
    assert "rank 1 was killed by SIGKILL" in capfd.readouterr().err
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "rank.py.0").read_text()), 0)


@pytest.mark.parametrize(
    ("error", "shown"), [("gloo: Connection closed by peer [127.0.0.1]:7", False), ("a bug", True)]
)
def test_a_rank_that_loses_one_with_a_message_says_nothing_of_it(tmp_path, capfd, error, shown):
    body = f"""
    import traceback
    from dattrain.runtime.spawn import report
    if rank == 1:
        report("dattrain train: a.png: not an image")
        sys.exit(1)
    try:
        raise RuntimeError({error!r})
    except RuntimeError:
        report(traceback.format_exc())
    sys.exit(1)
    """
    assert launch(script(tmp_path, body), 2) == 1
    said = capfd.readouterr().err
    assert said.endswith("dattrain train: a.png: not an image\n") and ("Traceback" in said) == shown


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        ("gloo: Read error [127.0.0.1]:7: Connection reset by peer", False),
        ("Failed to recv, got 0 bytes. Connection was likely closed.", False),
        ("a bug", True),
    ],
)
def test_a_rank_that_was_killed_is_said_last_without_who_lost_it(tmp_path, monkeypatch, capfd, error, shown):
    body = f"""
    from dattrain.runtime.spawn import report
    if rank == 1: os.kill(os.getpid(), 9)
    report("Traceback (most recent call last):\\n  File ...\\nRuntimeError: " + {error!r} + "\\n")
    sys.exit(1)
    """
    wait = spawn._wait  # finds that both have ended: rank 0, which it meets first, only lost the other
    monkeypatch.setattr(spawn, "_wait", lambda ranks: ([rank.wait() for rank in ranks], wait(ranks))[1])
    assert launch(script(tmp_path, body), 2) == 128 + 9
    said = capfd.readouterr().err
    assert said.endswith("dattrain: rank 1 was killed by SIGKILL; the other ranks were ended too\n")
    assert ("Traceback" in said) == shown


LAUNCHER = "import sys\nfrom dattrain.runtime.spawn import launch\nsys.exit(launch(sys.argv[1:], 2))"


def started(tmp_path, body):
    """A launcher in a process of its own, once both ranks are up."""
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, *script(tmp_path, body)])
    while len(list(tmp_path.glob("up.*"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    return process


def test_signals_are_forwarded_to_every_rank(tmp_path):
    body = f"""
    signal.signal(signal.SIGUSR2, lambda *_: sys.exit({REQUEUE}))
    open(os.path.dirname(sys.argv[0]) + f"/up.{{rank}}", "w").close()
    time.sleep(600)
    """
    process = started(tmp_path, body)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(30) == REQUEUE


def test_ranks_do_not_outlive_a_launcher_that_was_killed(tmp_path):
    body = """
    path = os.path.dirname(sys.argv[0]) + f"/up.{rank}"
    open(path + ".part", "w").write(str(os.getpid()))
    os.rename(path + ".part", path)
    time.sleep(600)
    """
    process = started(tmp_path, body)
    pids = [int(path.read_text()) for path in tmp_path.glob("up.?")]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
