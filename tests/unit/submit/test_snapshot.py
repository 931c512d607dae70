"""The code of a run: what is copied, what is recorded, in a checkout and outside of one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dattrain.runtime import revision
from dattrain.submit import snapshot


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small package in a folder of its own, which is not a checkout."""
    root = tmp_path / "src"
    for package in revision.TRACKED:
        (root / package / "__pycache__").mkdir(parents=True)
        (root / package / "__init__.py").write_text("VALUE = 1\n")
        (root / package / "__pycache__" / "x.pyc").write_text("")
    monkeypatch.setattr(revision, "source_root", lambda: root)
    return root


def _git(root: Path, *arguments: str) -> None:
    subprocess.run(
        ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@t", *arguments],
        check=True,
        capture_output=True,
    )


def test_outside_of_git_the_copy_and_its_checksum_are_the_record(source: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "submit").mkdir(parents=True)
    code = snapshot.create(run)
    found = json.loads((run / "code.json").read_text())
    assert (found["revision"], found["dirty"], found["diff"]) == (None, None, None)
    assert not list(code.rglob("*.pyc"))
    assert found["sha256"] == snapshot.digest(code)
    (source / "dattrain" / "__init__.py").write_text("VALUE = 2\n")
    assert (code / "dattrain" / "__init__.py").read_text() == "VALUE = 1\n"
    snapshot.create(run)
    assert (code / "dattrain" / "__init__.py").read_text() == "VALUE = 2\n"
    assert json.loads((run / "code.json").read_text())["sha256"] != found["sha256"]
    assert [p.name for p in (run / "submit").iterdir()] == ["code"]


def test_in_a_checkout_revision_diff_and_new_files_are_recorded(source: Path, tmp_path: Path) -> None:
    (source / ".gitignore").write_text("__pycache__\n")
    _git(source, "init", "-q")
    _git(source, "add", ".")
    _git(source, "commit", "-qm", "one")
    found, diff = revision.describe()
    assert found["dirty"] is False
    assert len(found["revision"]) == 40
    assert diff == b""
    (source / "dattrain" / "__init__.py").write_text("VALUE = 3\n")
    (source / "dattrain" / "new.py").write_text("")
    found, diff = revision.describe()
    assert found["dirty"] is True
    assert found["untracked"] == ["dattrain/new.py"]
    assert b"+VALUE = 3" in diff


def test_a_checkout_around_site_packages_is_not_ours(source: Path) -> None:
    (source / ".gitignore").write_text("*\n")
    _git(source, "init", "-q")
    assert revision.describe()[0]["revision"] is None


def test_a_task_imports_the_snapshot_and_neither_the_working_folder_nor_what_is_installed(
    tmp_path: Path,
) -> None:
    run, checkout = tmp_path / "run", tmp_path / "checkout"
    (run / "submit").mkdir(parents=True)
    code = snapshot.create(run)
    (checkout / "dattrain").mkdir(parents=True)
    (checkout / "dattrain" / "__init__.py").write_text("raise RuntimeError('the code of the working folder')")
    shown = subprocess.check_output(
        [sys.executable, str(code / "dattrain" / "submit" / "enter.py"), "-u", "-m", "dattrain", "--version"], cwd=checkout,
        text=True,
    )  # fmt: skip
    assert shown.startswith("dattrain ")
    (code / "dattrain" / "__init__.py").write_text("__version__ = 'of the snapshot'")
    shown = subprocess.check_output(
        [sys.executable, str(code / "dattrain" / "submit" / "enter.py"), "-m", "dattrain", "--version"],
        cwd=checkout,
        text=True,
    )
    assert shown == "dattrain of the snapshot\n"
