"""``manifest.json``: what a checkpoint says of itself. Pure of torch, of DeepSpeed and of ranks.

It is the last file of a checkpoint to be written, guards every rank file by size and checksums (``rank_file.Digest``) and
itself by a checksum of its own text. Whether the files are there is asked in ``checkpoint``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dattrain.errors import Damaged
from dattrain.state.format.rank_file import Digest, open_regular

FORMAT = 1
MANIFEST = "manifest.json"
_RANK_FILE = re.compile(r"rank_\d{5,}\.safetensors")
_LIMIT = 1 << 30
"""Bytes; what is larger is no manifest."""


def rank_file_name(rank: int) -> str:
    """Name of the file that ``rank`` writes."""
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
    """States that the rank files hold for each trainable parameter: ``param``, ``exp_avg``, ``exp_avg_sq``, perhaps ``ema``."""
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
        """Bytes of all rank files."""
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
                if not _RANK_FILE.fullmatch(name):
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
    if size > _LIMIT:
        raise Damaged(f"{MANIFEST}: {size} bytes are no manifest")
    fd = open_regular(path, size)
    with open(fd, "rb") as file:
        return Manifest.parse(file.read())
