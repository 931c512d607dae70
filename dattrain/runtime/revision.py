"""Which code runs: version, git revision, and how the checkout differs from it. No torch, so that a login node can ask."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import dattrain

DIFF = "code.diff"
"""File of a run folder that holds the difference."""
TRACKED = ("dattrain", "configs", "launch")
"""Folders of a checkout that matter to a run."""


def source_root() -> Path:
    """Folder that holds the package which is running now: a checkout, or site-packages."""
    return Path(dattrain.__file__).resolve().parents[1]


def describe() -> tuple[dict[str, Any], bytes]:
    """What ``code.json`` says of the running package, and the diff against its revision: empty for a clean checkout."""
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
        "diff": DIFF if diff else None,
        "untracked": new.decode(errors="replace").splitlines(),
    }, diff


def _git(root: Path, *arguments: str) -> bytes | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
