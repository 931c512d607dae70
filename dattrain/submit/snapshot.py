"""The code of a run, kept in its folder: the job runs what was there when it was submitted, whatever is edited meanwhile."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from dattrain.runtime import revision

LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so", "*.egg-info")


def create(run: Path) -> Path:
    """Copy the package to ``run/submit/code``, write ``run/code.json`` and ``run/code.diff``; returns the copy.

    The copy is made beside it and renamed, so a job that starts meanwhile sees the old one or the new one. Recipes and cluster
    profiles, which a checkout links into the package, are copied with it.
    """
    target = run / "submit" / "code"
    staging = target.with_name(f"code.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(revision.source_root() / "dattrain", staging / "dattrain", ignore=LEFT_OUT)
    found, diff = revision.describe()
    found |= {"snapshot": "submit/code", "sha256": digest(staging)}
    old = target.with_name(f"code.{os.getpid()}.old")
    if target.exists():
        target.rename(old)
    staging.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    (run / revision.DIFF).write_bytes(diff)
    (run / "code.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return target


def digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's files."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(
            str(path.relative_to(folder)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest()
        )
    return total.hexdigest()
