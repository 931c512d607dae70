"""The driver of ``python -m benchmarks.gpu`` on stages that crash, hang and babble: real child processes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import runner, stages, waits
from benchmarks.gpu.stages import Stage

ROOT = Path(__file__).parents[3]
KEY = {"commit": "c0ffee", "device": "cpu", "dry": True}


def child(code: str, seconds: float = 60.0):
    log = io.BytesIO()
    return runner.run([sys.executable, "-c", code], seconds, log), log.getvalue()


def test_a_segmentation_fault_costs_the_child_alone():
    ended, _ = child("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    found = runner.entry(stages.STAGES[0], ended, b"", KEY, limit=60, dry=False)
    assert (found["status"], found["reason"]) == ("failed", "died of SIGSEGV")


def test_a_hang_ends_at_its_limit_with_what_it_started(tmp_path):
    pid = tmp_path / "pid"
    code = f"""
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(pid)!r}, "w").write(str(other.pid))
print("begun", flush=True)
other.wait()
"""
    begin = time.monotonic()
    ended, log = child(code, 2.0)
    assert ended.code is None and time.monotonic() - begin < 10 and log == b"begun\n"
    line = b'{"figure": "cases", "value": 3, "unit": ""}\n'
    found = runner.entry(stages.STAGES[1], ended, line, KEY, limit=2, dry=False)
    assert (found["status"], found["reason"]) == ("failed", "past its limit of 2 s")
    assert found["figures"]["cases"]["value"] == 3  # what it had measured is kept
    deadline = time.monotonic() + 5
    while _alive(int(pid.read_text())) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(int(pid.read_text()))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_garbage_is_logged_up_to_a_limit_and_read_as_none():
    code = "import os, sys; [os.write(1, bytes(range(256)) * 256) for _ in range(40)]; os.write(1, b'\\n\\xff\\x00the end\\n'); sys.exit(3)"
    ended, log = child(code)
    assert ended.code == 3 and ended.last.endswith("the end") and ended.last.isprintable()
    assert runner.LOGGED < len(log) < runner.LOGGED + 10_000 and b"the end" in log
    found = runner.entry(
        stages.STAGES[0], runner.Ended(0, "", 1.0), b"\xff{}\n[1]\nnull\n", KEY, limit=60, dry=False
    )
    assert (found["status"], found["reason"]) == ("failed", "3 of its lines are no figures")


def test_a_missing_package_is_named_and_takes_no_other_stage_along(tmp_path, monkeypatch, capsys):
    facts = next(stage for stage in stages.STAGES if stage.name == "augment")
    monkeypatch.setattr(
        command, "STAGES", (Stage("lacking", "lacking", "run", 20, "a package that is not there"), facts)
    )
    # Found before the real package, which has no module of this name; and gone when the test ends.
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / "sitecustomize.py").write_text(
        "import sys, types\n"
        "module = types.ModuleType('benchmarks.gpu.lacking')\n"
        "def run(job):\n    job.figure('begun', 1)\n    import no_such_package_of_ours\n"
        "module.run = run\nsys.modules['benchmarks.gpu.lacking'] = module\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(shadow), os.environ.get("PYTHONPATH", "")]))
    out = tmp_path / "out"
    assert command.main(["--out", str(out), "--dry-run"]) == 1
    results = json.loads((out / "results.json").read_text())
    first, second = results["stages"]
    assert (first["status"], first["figures"]["begun"]["value"]) == ("failed", 1)
    assert first["reason"].endswith("needs the package no_such_package_of_ours, which is not installed here")
    assert (second["status"], second["reason"], second["dry"]) == ("not run", "walked on a CPU", True)
    capsys.readouterr()
    # A second call at the same commit runs neither again, and one without time starts nothing.
    assert command.main(["--out", str(out), "--dry-run"]) == 1
    assert capsys.readouterr().out.count("done before") == 2
    assert command.main(["--out", str(tmp_path / "late"), "--dry-run", "--minutes", "0.4"]) == 1
    late = json.loads((tmp_path / "late" / "results.json").read_text())["stages"][1]
    assert late["status"] == "not run" and late["reason"].startswith("its limit is 90 s, and")


def test_without_a_device_nothing_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert command.main(["--out", str(tmp_path)]) == 1
    assert "torch sees no CUDA device here; --dry-run walks the stages" in capsys.readouterr().err


def test_host_waits_are_counted_by_place(monkeypatch):
    from deepspeed.accelerator import get_accelerator

    called = []
    monkeypatch.setattr(get_accelerator(), "synchronize", lambda *a: called.append(a), raising=False)
    with waits.counted(torch.device("cpu")) as places:
        for _ in range(2):
            warnings.warn(
                "called a synchronizing CUDA operation (Triggered internally)", UserWarning, stacklevel=1
            )
        warnings.warn("something else", UserWarning, stacklevel=1)
        get_accelerator().synchronize()
    assert len(called) == 1 and sorted(places.values()) == [1, 2], places
    assert all(Path(__file__).name in place for place in places)
    ours = traceback.FrameSummary(
        str(Path(waits.__file__).parents[2] / "dattrain" / "data" / "augment" / "mixup.py"), 84, "mix"
    )
    inner = traceback.FrameSummary("/somewhere/torch/_tensor.py", 1, "to")
    outer = traceback.FrameSummary("/somewhere/dattrain/tests/x.py", 1, "test")
    assert waits.place([outer, ours, inner]) == "dattrain/data/augment/mixup.py:84 mix"


def test_who_ends_the_command_ends_its_stage(tmp_path):
    def stages() -> list[Path]:
        """Command lines of stages of this folder that are alive."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().decode(errors="replace")
                if "benchmarks.gpu.child" in words and str(tmp_path) in words:
                    found.append(path)
        return found

    line = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--dry-run", "--only", "train"]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 60
        while not stages() and time.monotonic() < until:
            time.sleep(0.05)
        assert stages()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 130
    until = time.monotonic() + 5  # what was killed dies when it next runs; a stage takes longer
    while stages() and time.monotonic() < until:
        time.sleep(0.05)
    assert not stages()
