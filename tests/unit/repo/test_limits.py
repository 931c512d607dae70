"""A test that hangs is a failure with every stack, in Python or inside C."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[2]
IN_PYTHON = """
import threading, time

def test_python():
    threading.Thread(target=time.sleep, args=(60,), daemon=True, name="another").start()
    threading.Event().wait()

def test_next():
    pass
"""
IN_C = """
import ctypes

def test_c():
    lock, libc = ctypes.create_string_buffer(64), ctypes.PyDLL(None)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)
"""


def run(folder, code, grace):
    (folder / "test_hangs.py").write_text(code)
    # Not as tests/conftest.py, which it is to them: as a plugin, with a grace of its own.
    (folder / "short.py").write_text(f"import conftest\nconftest.GRACE = {grace}\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "short", "-c", str(TESTS.parent / "pyproject.toml"),
         "--rootdir", str(folder), "--timeout", "1", str(folder / "test_hangs.py")],
        env={**os.environ, "PYTHONPATH": f"{TESTS}:{folder}"}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip


def test_a_hang_in_python_fails_with_every_stack_and_the_next_test_runs(tmp_path):
    done = run(tmp_path, IN_PYTHON, grace=60)
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout
    assert "Stack of another" in done.stdout and "threading.Event().wait()" in done.stdout


def test_a_hang_inside_c_ends_the_process_with_its_stacks(tmp_path):
    done = run(tmp_path, IN_C, grace=1)
    assert done.returncode == 1 and "in test_c" in done.stderr
