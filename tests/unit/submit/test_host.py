"""The Python of the batch script: which one by default, what is said of a wrong one before and in the job."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import dattrain
from dattrain.submit import host
from dattrain.submit.cluster import Container, Profile

ENTER = Path(dattrain.__file__).parent / "submit" / "enter.py"


def _program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def python36(tmp_path: Path) -> str:
    """What answers as Python 3.6 does."""
    return _program(
        tmp_path / "python 3.6",
        """case "$1" in -V) echo "Python 3.6.8"; exit 0;; esac
case "$2" in *print*) echo 3.6.8; exit 0;; *"< (3, 8)"*) exit 1;; esac
echo "SyntaxError: future feature annotations is not defined" >&2; exit 1""",
    )


def test_the_default_is_a_python_that_works() -> None:
    box = Container(runtime="apptainer", image="/i.sif")
    assert host.interpreter(Profile()) == sys.executable
    assert host.interpreter(Profile(python="/env/bin/python")) == "/env/bin/python"
    # What the tasks have in their container, the host has not.
    assert host.interpreter(Profile(python="/opt/python", container=box)) == sys.executable
    assert host.interpreter(Profile(python="/env/python", host_python="python3.9")) == "python3.9"
    assert host.problem(Profile()) is None


def test_a_wrong_one_is_refused_before_the_job_with_key_and_value(tmp_path: Path, python36: str) -> None:
    none = str(tmp_path / "python9")
    for python, words in (
        (python36, f"host_python: {python36} is Python 3.6.8; it must be a Python 3.8 or newer"),
        (none, f"host_python: {none} cannot be run on this machine (No such file or directory)"),
        ("python9", "host_python: python9 cannot be run"),
        (_program(tmp_path / "true", "exit 0"), "is not a Python that works (exit status 0)"),
    ):
        said = host.problem(Profile(host_python=python))
        assert said is not None and words in said and f"leave it out to take {sys.executable}" in said
    assert host.problem(Profile(host_python=sys.executable)) is None


def test_what_setup_may_change_is_left_to_the_node() -> None:
    assert host.problem(Profile(host_python="python9", setup=("module load python",))) is None


def test_the_node_says_it_in_one_sentence(tmp_path: Path, python36: str) -> None:
    shim = tmp_path / "shim"
    shim.write_text(
        "#!/bin/sh\nprintf 'pyenv: python3.9: command not found\\n\\nIt exists in:\\n  3.9.18\\n' >&2; exit 127\n"
    )
    shim.chmod(0o755)
    seen_of = {
        python36: "Python 3.6.8",
        str(tmp_path / "no"): "No such file",
        str(shim): "pyenv: python3.9: command not found)",
    }
    for python, seen in seen_of.items():
        script = f"set -eu\n{host.version_check(Profile(host_python=python))}\necho went on"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.count("\n") == 1
        assert (
            "has no Python 3.8 or newer at" in done.stderr and python in done.stderr and seen in done.stderr
        )
        assert "set host_python in the profile" in done.stderr
    done = subprocess.run(
        ["bash", "-c", f"set -eu\n{host.version_check(Profile())}\necho went on"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")


def test_an_old_python_of_a_task_reads_enter_and_says_what_it_is() -> None:
    # Python 3.6 knows no `from __future__ import annotations`; the syntax is checked as it would be there.
    code = f"import ast; ast.parse(open({str(ENTER)!r}).read(), feature_version=(3, 6))"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "annotations" not in ENTER.read_text()
    told = (
        "import sys, runpy; sys.version_info = (3, 6, 8); sys.argv = ['enter.py', '-m', 'x'];"
        f"runpy.run_path({str(ENTER)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True)
    assert done.returncode == 1 and "is Python 3.6.8; it has to be 3.8 or newer" in done.stderr
