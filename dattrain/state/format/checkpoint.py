"""Checkpoints as folders: publish, list, find the newest complete one, verify. Pure of torch, of DeepSpeed and of ranks.

A checkpoint is ``step_00001234/`` with one safetensors file per rank (``rank_file``) and a ``manifest.json``
(``manifest``). It exists when its manifest does: it is written under a name that nothing looks for, and renamed when every
byte of it is on the disk. docs/checkpoints.md describes the format for readers in other languages.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dattrain.errors import Damaged, UserError
from dattrain.files import doing, sync, write_atomically
from dattrain.state.format.manifest import MANIFEST, Manifest, read_manifest
from dattrain.state.format.rank_file import BLOCK, Reader, check_regular

PIN = "pinned"
"""An empty file of this name in a checkpoint's folder keeps retention away from it."""
METRICS = "metrics.json"
"""The evaluation of a checkpoint that was evaluated after it was published: a JSON object of numbers by name."""
_FOLDER = re.compile(r"step_(\d{8,})")


def folder_name(step: int) -> str:
    """Name of the checkpoint of ``step``."""
    return f"step_{step:08d}"


def check(folder: Path) -> Manifest:
    """Read the manifest and check that every rank file is there in its size, without opening any. Raises Damaged."""
    manifest = read_manifest(folder)
    named = _FOLDER.fullmatch(folder.name)
    if named and int(named[1]) != manifest.step:
        raise Damaged(f"{MANIFEST}: is of step {manifest.step}")
    for name, digest in manifest.files.items():
        check_regular(folder / name, digest.size)
    return manifest


def verify(folder: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Manifest:
    """``check``, then read every byte of every rank file against its checksum. Raises Damaged, naming file and place.

    ``progress`` is called with the bytes read so far and in all.
    """
    manifest, done = check(folder), 0
    for name, digest in manifest.files.items():
        with Reader(folder / name, digest) as reader:
            reader.pieces()
            for index in range(-(-digest.size // BLOCK)):
                done += len(reader.block(index))
                progress(done, manifest.nbytes)
    return manifest


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint folder as found. ``manifest`` is None when it is not complete; ``reason`` says why."""

    folder: Path
    manifest: Manifest | None
    reason: str = ""
    pinned: bool = False
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """What ``METRICS`` holds; what the manifest has of the kind (older versions) is not in it."""

    @property
    def step(self) -> int:
        """The step that its name tells."""
        match = _FOLDER.fullmatch(self.folder.name)
        return int(match[1]) if match else -1

    def metric(self, name: str) -> float | None:
        """A number of its evaluation; None where there is none, or it is not finite."""
        if self.manifest is None:
            return None
        value = self.metrics.get(name)
        if not isinstance(value, (int, float)):
            return self.manifest.metric(name)
        return float(value) if math.isfinite(value) else None


def write_metrics(folder: Path, metrics: Mapping[str, float]) -> None:
    """Note the evaluation of a published checkpoint beside its manifest: all of it or nothing. Raises OSError."""
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    write_atomically(folder / METRICS, json.dumps(finite, indent=2) + "\n", durable=True)


def read_metrics(folder: Path) -> dict[str, Any]:
    """What ``write_metrics`` wrote; empty where nothing did."""
    try:
        found = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def list_all(root: Path) -> list[CheckpointInfo]:
    """Every checkpoint under ``root``, oldest first, each checked by size."""
    found = []
    for folder in root.iterdir() if root.is_dir() else ():
        if _FOLDER.fullmatch(folder.name) and folder.is_dir():
            pinned = (folder / PIN).exists()
            try:
                found.append(CheckpointInfo(folder, check(folder), "", pinned, read_metrics(folder)))
            except Damaged as e:
                found.append(CheckpointInfo(folder, None, str(e), pinned))
    return sorted(found, key=lambda e: e.step)


@dataclass(frozen=True)
class Found:
    """The newest complete checkpoint, None if there is none, and the newer ones that were skipped, with the reason."""

    folder: Path | None
    manifest: Manifest | None
    skipped: tuple[tuple[str, str], ...] = ()


def find(root: Path, *, read_all: bool = False, skip: Mapping[str, str] | None = None) -> Found:
    """The newest complete checkpoint under ``root``, judged by sizes, or by checksums (``read_all``).

    ``skip`` maps names that are known to be damaged to the reason.
    """
    skipped: list[tuple[str, str]] = []
    for entry in reversed(list_all(root)):
        reason = (skip or {}).get(entry.folder.name, entry.reason)
        if not reason and read_all:
            try:
                verify(entry.folder)
            except Damaged as e:
                reason = str(e)
        if not reason:
            return Found(entry.folder, entry.manifest, tuple(skipped))
        skipped.append((entry.folder.name, reason))
    return Found(None, None, tuple(skipped))


def locate(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the newest complete one of a run or a ``checkpoints`` folder.

    Raises:
        UserError: there is none, or the one named is damaged.
    """
    if (path / MANIFEST).exists() or _FOLDER.fullmatch(path.name):
        try:
            check(path)
        except Damaged as e:
            raise UserError(f"{path} is not a complete checkpoint: {e}") from e
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = find(root)
    if found.folder is None:
        raise UserError(none_complete(root, found.skipped))
    return found.folder


def none_complete(root: Path, skipped: Sequence[tuple[str, str]]) -> str:
    """The message for a folder without a complete checkpoint."""
    if not skipped:
        return f"{root} holds no checkpoint"
    listed = "; ".join(f"{name} ({reason})" for name, reason in skipped)
    return f"{root} holds no complete checkpoint: {listed}. Nothing was changed"


# Publishing. Names that begin with a dot are no checkpoint: leftovers of a killed process, which ``recover`` removes.


def temporary_folder(root: Path, step: int, token: str) -> Path:
    """Where the checkpoint of ``step`` is written before it exists."""
    return root / f".new-{token}-{folder_name(step)}"


def publish(folder: Path, manifest: Manifest) -> Path:
    """Give the finished rank files in ``folder`` (a ``temporary_folder``) their manifest and their name; returns the published folder.

    An older checkpoint of the same step (a damaged one that the run has passed again, or one from before a rollback) is
    renamed first; ``recover`` puts it back if the process dies before the new one has its name.
    """
    root = folder.parent
    final = root / folder_name(manifest.step)
    with doing(f"writing {MANIFEST}"), open(folder / MANIFEST, "xb") as file:
        file.write(manifest.render())
        file.flush()
        with doing(f"syncing (fsync) {MANIFEST}"):
            os.fsync(file.fileno())
    with doing(f"syncing (fsync) the folder {folder.name}"):
        sync(folder)
    replaced = None
    if final.exists():
        replaced = root / f".old-{final.name}"
        shutil.rmtree(replaced, ignore_errors=True)
        if (final / PIN).exists():
            (folder / PIN).touch()
        with doing(f"renaming the folder {final.name} to {replaced.name}"):
            os.rename(final, replaced)
    with doing(f"renaming the folder {folder.name} to {final.name}"):
        os.rename(folder, final)
    with doing(f"syncing (fsync) the folder {root.name}"):
        sync(root)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    return final


def remove(folder: Path) -> None:
    """Remove a published checkpoint: it first loses its name, so that no moment shows half of it."""
    gone = folder.with_name(f".gone-{folder.name}")
    shutil.rmtree(gone, ignore_errors=True)
    with doing(f"renaming the folder {folder.name} to {gone.name}"):
        os.rename(folder, gone)
    with doing(f"syncing (fsync) the folder {folder.parent.name}"):
        sync(folder.parent)
    shutil.rmtree(gone, ignore_errors=True)


def recover(root: Path) -> list[str]:
    """Finish or undo what a killed process left under ``root``; returns the names removed. The owner of the run calls it.

    What goes loses its name first: a process that was taken for dead finds nothing that it could publish, or all of it.
    """
    removed = []
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        if path.name.startswith(".old-"):
            final = root / path.name.removeprefix(".old-")
            if not final.exists():
                os.rename(path, final)
                sync(root)
                continue
        elif not path.name.startswith((".new-", ".gone-")):
            continue
        gone = path.with_name(f".gone-{path.name}") if path.name.startswith(".new-") else path
        with contextlib.suppress(OSError):
            os.rename(path, gone)
        for leftover in (path, gone):
            shutil.rmtree(leftover, ignore_errors=True)
        removed.append(path.name)
    return removed
