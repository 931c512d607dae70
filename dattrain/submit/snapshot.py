"""The code of a run, kept in its folder: the job runs what was there when it was submitted, whatever is edited meanwhile."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import dattrain

TRACKED = ("dattrain", "configs", "launch")
"""Folders of a checkout that the snapshot holds; the last two by way of the links in the first, whose targets are copied."""
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so", "*.egg-info")


def source_root() -> Path:
    """Folder that holds the package which is running now: a checkout, or site-packages."""
    return Path(dattrain.__file__).resolve().parents[1]


def create(run: Path) -> Path:
    """Copy the package to ``run/submit/code``, write ``run/code.json`` and ``run/code.diff``; returns the copy.

    The copy is made beside it and renamed, so a job that starts meanwhile sees the old one or the new one.
    """
    target = run / "submit" / "code"
    staging = target.with_name(f"code.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(source_root() / "dattrain", staging / "dattrain", ignore=LEFT_OUT)
    found, diff = describe()
    found["sha256"] = digest(staging)
    old = target.with_name(f"code.{os.getpid()}.old")
    if target.exists():
        target.rename(old)
    staging.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    (run / "code.diff").write_bytes(diff)
    (run / "code.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return target


def describe() -> tuple[dict[str, Any], bytes]:
    """What ``code.json`` says, and the diff against the revision: empty for a clean checkout, or outside of git."""
    root = source_root()
    # A checkout that merely contains site-packages (a virtual environment inside another project) says nothing about us.
    tracked = _git(root, "ls-files", "--error-unmatch", "dattrain/__init__.py") is not None
    head = _git(root, "rev-parse", "HEAD") if tracked else None
    diff = (_git(root, "diff", "--binary", "HEAD", "--", *TRACKED) or b"") if head else b""
    new = (_git(root, "ls-files", "--others", "--exclude-standard", "--", *TRACKED) or b"") if head else b""
    return {
        "version": dattrain.__version__,
        "revision": head.decode().strip() if head else None,
        "dirty": bool(diff or new) if head else None,
        "diff": "code.diff" if diff else None,
        "untracked": new.decode(errors="replace").splitlines(),
        "snapshot": "submit/code",
    }, diff


def digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's files."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(
            str(path.relative_to(folder)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest()
        )
    return total.hexdigest()


def _git(root: Path, *arguments: str) -> bytes | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
