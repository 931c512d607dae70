"""Checkpoints as folders: publish, list, find the newest whole one, verify. Pure of torch, of DeepSpeed and of ranks.

A checkpoint is ``step_00001234/`` with one safetensors shard per rank and a ``manifest.json``. It exists when its manifest
does: it is written under a name that nothing looks for, and renamed when every byte of it is on the disk. The manifest is
the last file to be written, guards every shard by size and checksums (``shards.Digest``) and itself by a checksum of its
own text. docs/checkpoints.md describes the format for readers in other languages.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dattrain.errors import Damaged, UserError
from dattrain.runtime.files import doing, sync
from dattrain.state.format.rank_file import BLOCK, Digest, Reader, check_regular, open_regular, read_block

FORMAT = 1
MANIFEST = "manifest.json"
PIN = "pinned"
"""An empty file of this name in a checkpoint's folder keeps retention away from it."""
_FOLDER = re.compile(r"step_(\d{8,})")
_SHARD = re.compile(r"rank_\d{5,}\.safetensors")
_MANIFEST_LIMIT = 1 << 30


def folder_name(step: int) -> str:
    """Name of the checkpoint of ``step``."""
    return f"step_{step:08d}"


def shard_name(rank: int) -> str:
    """Name of the shard that ``rank`` writes."""
    return f"rank_{rank:05d}.safetensors"


@dataclass(frozen=True)
class Parameter:
    """A parameter as the manifest lists it, in the model's order.

    ``opt_step`` is the number of updates that Adam has counted for it (its bias correction), None when it is frozen.
    """

    shape: tuple[int, ...]
    trainable: bool = True
    opt_step: int | None = 0

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says. ``meta`` is the trainer's: samples_seen, metrics, ... (JSON)."""

    step: int
    samples_seen: int
    world: int
    stage: int
    precision: str
    states: tuple[str, ...]
    """States that the shards hold for each trainable parameter: ``param``, ``exp_avg``, ``exp_avg_sq``, perhaps ``ema``."""
    parameters: Mapping[str, Parameter]
    buffers: tuple[str, ...] = ()
    files: Mapping[str, Digest] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Loss scale and step counters of the engine."""
    groups: Sequence[Mapping[str, Any]] = ()
    """Hyperparameters of the optimizer's groups when it was saved, for the reader; the recipe decides at a resume."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    config_sha256: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    saved_at: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(f.size for f in self.files.values())

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(p.numel for p in self.parameters.values())

    def metric(self, name: str) -> float | None:
        """A metric out of ``meta["metrics"]``, None when it is not there or is not a number."""
        metrics = self.meta.get("metrics")
        value = metrics.get(name) if isinstance(metrics, Mapping) else None
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None

    def render(self) -> bytes:
        """The text of ``manifest.json``: JSON whose ``sha256`` is that of the text of its ``manifest``."""
        body = {
            "format": FORMAT,
            "step": self.step,
            "samples_seen": self.samples_seen,
            "world": self.world,
            "stage": self.stage,
            "precision": self.precision,
            "states": list(self.states),
            "engine": dict(self.engine),
            "meta": dict(self.meta),
            "groups": [dict(g) for g in self.groups],
            "config_sha256": self.config_sha256,
            "versions": dict(self.versions),
            "saved_at": self.saved_at,
            "parameters": {n: [list(p.shape), p.trainable, p.opt_step] for n, p in self.parameters.items()},
            "buffers": list(self.buffers),
            "files": {n: f.to_json() for n, f in self.files.items()},
        }
        return _render(body)

    @classmethod
    def parse(cls, text: bytes) -> Manifest:
        """The reverse of ``render``. Raises Damaged for anything that ``render`` did not write."""
        try:
            body = json.loads(text)["manifest"]
            if _render(body) != text:
                raise Damaged(f"{MANIFEST}: does not have its checksum")
            if body["format"] != FORMAT:
                raise Damaged(
                    f"{MANIFEST}: is of format {body['format']!r}; this version reads format {FORMAT}"
                )
            parameters = {
                n: Parameter(tuple(map(int, shape)), bool(trainable), None if step is None else int(step))
                for n, (shape, trainable, step) in body["parameters"].items()
            }
            files = {}
            for name, entry in body["files"].items():
                if not _SHARD.fullmatch(name):
                    raise Damaged(f"{MANIFEST}: names the file {name!r}, which no checkpoint has")
                files[name] = Digest.from_json(entry)
            if not files:
                raise Damaged(f"{MANIFEST}: names no files")
            return cls(
                step=int(body["step"]),
                samples_seen=int(body["samples_seen"]),
                world=int(body["world"]),
                stage=int(body["stage"]),
                precision=str(body["precision"]),
                states=tuple(map(str, body["states"])),
                parameters=parameters,
                buffers=tuple(map(str, body["buffers"])),
                files=files,
                engine=dict(body["engine"]),
                groups=list(body["groups"]),
                meta=dict(body["meta"]),
                config_sha256=str(body["config_sha256"]),
                versions=dict(body["versions"]),
                saved_at=str(body["saved_at"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise Damaged(f"{MANIFEST}: cannot be read ({type(e).__name__}: {e})") from e


def _render(body: Any) -> bytes:
    text = json.dumps(body, indent=1)
    return f'{{"sha256": "{hashlib.sha256(text.encode()).hexdigest()}", "manifest": {text}}}\n'.encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint. Raises Damaged when it is missing, changed or of another format."""
    path = folder / MANIFEST
    try:
        size = os.lstat(path).st_size
    except OSError as e:
        raise Damaged(f"{MANIFEST}: {'missing' if isinstance(e, FileNotFoundError) else e.strerror}") from e
    if size > _MANIFEST_LIMIT:
        raise Damaged(f"{MANIFEST}: {size} bytes are no manifest")
    fd = open_regular(path, size)
    with open(fd, "rb") as file:
        return Manifest.parse(file.read())


def check(folder: Path) -> Manifest:
    """Read the manifest and check that every shard is there in its size, without opening any. Raises Damaged."""
    manifest = read_manifest(folder)
    named = _FOLDER.fullmatch(folder.name)
    if named and int(named[1]) != manifest.step:
        raise Damaged(f"{MANIFEST}: is of step {manifest.step}")
    for name, digest in manifest.files.items():
        check_regular(folder / name, digest.size)
    return manifest


def verify(folder: Path, progress: Callable[[int], None] | None = None) -> Manifest:
    """``check``, then read every byte of every shard against its checksum. Raises Damaged, naming file and place.

    ``progress`` is told the bytes read since its last call.
    """
    manifest = check(folder)
    for name, digest in manifest.files.items():
        path = folder / name
        fd = open_regular(path, digest.size)
        try:
            for index in range(-(-digest.size // BLOCK)):
                block = read_block(fd, path, digest, index)
                if progress is not None:
                    progress(len(block))
        finally:
            os.close(fd)
        with Reader(path, digest) as reader:
            reader.pieces()
    return manifest


@dataclass(frozen=True)
class Entry:
    """A checkpoint folder as found. ``manifest`` is None when it is not whole; ``reason`` says why."""

    folder: Path
    manifest: Manifest | None
    reason: str = ""
    pinned: bool = False

    @property
    def step(self) -> int:
        """The step that its name tells."""
        match = _FOLDER.fullmatch(self.folder.name)
        return int(match[1]) if match else -1


def entries(root: Path, *, level: Literal["size", "checksum"] = "size") -> list[Entry]:
    """Every checkpoint under ``root``, oldest first, each checked by size or by ``checksum``."""
    found = []
    for folder in root.iterdir() if root.is_dir() else ():
        if _FOLDER.fullmatch(folder.name) and folder.is_dir():
            pinned = (folder / PIN).exists()
            try:
                manifest = check(folder) if level == "size" else verify(folder)
                found.append(Entry(folder, manifest, "", pinned))
            except Damaged as e:
                found.append(Entry(folder, None, str(e), pinned))
    return sorted(found, key=lambda e: e.step)


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint, None if there is none, and the newer ones that were passed over, with the reason."""

    folder: Path | None
    manifest: Manifest | None
    passed_over: tuple[tuple[str, str], ...] = ()


def find(
    root: Path, *, level: Literal["size", "checksum"] = "size", skip: Mapping[str, str] | None = None
) -> Found:
    """The newest whole checkpoint under ``root``. ``skip`` maps names that are known to be damaged to the reason."""
    passed: list[tuple[str, str]] = []
    for entry in reversed(entries(root)):
        reason = (skip or {}).get(entry.folder.name, entry.reason)
        if not reason and level == "checksum":
            try:
                verify(entry.folder)
            except Damaged as e:
                reason = str(e)
        if not reason:
            return Found(entry.folder, entry.manifest, tuple(passed))
        passed.append((entry.folder.name, reason))
    return Found(None, None, tuple(passed))


def locate(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the newest whole one of a run or a ``checkpoints`` folder.

    Raises:
        UserError: there is none, or the one named is damaged.
    """
    if (path / MANIFEST).exists() or _FOLDER.fullmatch(path.name):
        try:
            check(path)
        except Damaged as e:
            raise UserError(f"{path} is not a whole checkpoint: {e}") from e
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = find(root)
    if found.folder is None:
        raise UserError(none_whole(root, found.passed_over))
    return found.folder


def none_whole(root: Path, passed_over: Sequence[tuple[str, str]]) -> str:
    """The message for a folder without a whole checkpoint."""
    if not passed_over:
        return f"{root} holds no checkpoint"
    listed = "; ".join(f"{name} ({reason})" for name, reason in passed_over)
    return f"{root} holds no whole checkpoint: {listed}. Nothing was changed"


# Publishing. Names that begin with a dot are nobody's checkpoint: leftovers of a killed process, cleared by ``recover``.


def aside(root: Path, step: int, token: str) -> Path:
    """Where the checkpoint of ``step`` is written before it exists."""
    return root / f".new-{token}-{folder_name(step)}"


def publish(folder: Path, manifest: Manifest) -> Path:
    """Give the finished shards in ``folder`` (an ``aside``) their manifest and their name; returns the published folder.

    An older checkpoint of the same step (a damaged one that the run has passed again, or one from before a rollback) is
    moved aside first; ``recover`` puts it back if we die before the new one has its name.
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
