"""Load a checkpoint into an engine of any world size and ZeRO stage, by the overlap of fragments.

Nothing is converted and nothing is gathered: each rank reads, of every shard, the byte ranges that lie in its own
fragments, and copies them where they belong. Beside its own state it holds ``shards.stream``'s few blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dattrain.errors import UserError
from dattrain.state import fragments
from dattrain.state.checkpoint import Manifest, Parameter
from dattrain.state.fragments import MOMENTS, LocalState
from dattrain.state.shards import Damaged, Digest, Piece, Reader, Span, stream

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {v: k for k, v in _DTYPES.items()}


@dataclass(frozen=True)
class Place:
    """A piece, and where it lies: file number, absolute first byte."""

    piece: Piece
    file: int
    begin: int


class Index:
    """Every piece of a checkpoint by (state, name), from the headers of its shards.

    Raises:
        Damaged: a header is not as written, or the pieces of a tensor do not cover it exactly once.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, verify: bool = True) -> None:
        self.files: list[tuple[Path, Digest]] = [(folder / n, d) for n, d in manifest.files.items()]
        self.manifest = manifest
        self.verify = verify
        self._places: dict[tuple[str, str], list[Place]] = {}
        for number, (path, digest) in enumerate(self.files):
            with Reader(path, digest, verify=verify) as reader:
                for key, found in reader.pieces().items():
                    self._places.setdefault(key, []).extend(Place(p, number, at) for p, at in found)
        for name, parameter in manifest.parameters.items():
            for state in manifest.states if parameter.trainable else ("param",):
                self._check_cover(state, name, parameter.numel)

    def _check_cover(self, state: str, name: str, numel: int) -> None:
        places = self._places.setdefault((state, name), [])
        places.sort(key=lambda p: p.piece.start)
        at = 0
        for place in places:
            if place.piece.start != at or place.piece.dtype != "F32":
                break
            at += place.piece.numel
        if at != numel or sum(p.piece.numel for p in places) != numel:
            raise Damaged(f"{state} of {name}: its fragments do not cover its {numel} elements exactly once")

    def overlap(self, state: str, name: str, start: int, numel: int) -> list[tuple[Place, int, int]]:
        """Places that hold elements of ``[start, start + numel)``, each with the first and last element of the overlap."""
        found = []
        for place in self._places.get((state, name), ()):
            lo = max(start, place.piece.start)
            hi = min(start + numel, place.piece.start + place.piece.numel)
            if lo < hi:
                found.append((place, lo, hi))
        return found

    def buffer(self, name: str) -> Tensor:
        """A buffer, whole, on the host. Raises Damaged."""
        places = self._places.get(("buffer", name), [])
        if len(places) != 1:
            raise Damaged(f"buffer {name} is there {len(places)} times")
        piece, path_digest = places[0].piece, self.files[places[0].file]
        with Reader(*path_digest, verify=self.verify) as reader:
            data = reader.read(places[0].begin, piece.nbytes)
        if not data:
            return torch.empty(piece.shape or (), dtype=_DTYPES[piece.dtype])
        return torch.frombuffer(data, dtype=_DTYPES[piece.dtype]).reshape(piece.shape or ())


def check_fits(
    parameters: Mapping[str, Parameter], manifest: Manifest, buffers: Mapping[str, Tensor]
) -> None:
    """Whether a checkpoint is of this model.

    Raises:
        UserError: listing what is missing, unexpected, of another shape, or was frozen and now is not.
    """
    wrong = [f"{n} is not in the checkpoint" for n in parameters if n not in manifest.parameters]
    wrong += [f"{n} is not in the model" for n in manifest.parameters if n not in parameters]
    wrong += [f"buffer {n} is not in the checkpoint" for n in buffers if n not in manifest.buffers]
    for name in parameters.keys() & manifest.parameters.keys():
        ours, theirs = parameters[name], manifest.parameters[name]
        if ours.shape != theirs.shape:
            wrong.append(f"{name} has shape {theirs.shape} in the checkpoint and {ours.shape} in the model")
        elif ours.trainable and not theirs.trainable:
            wrong.append(f"{name} was frozen when the checkpoint was saved and is trained now")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(
            f"the checkpoint of step {manifest.step} is not of this model: {'; '.join(sorted(wrong)[:5])}{more}. "
            "To start from its weights alone, use init.from"
        )


@torch.no_grad()
def load(
    local: LocalState,
    folder: Path,
    manifest: Manifest,
    ema: list[Tensor] | None = None,
    *,
    verify: bool = True,
) -> int:
    """Fill this rank's masters, moments, averages, buffers and counters from the checkpoint in ``folder``.

    Local: no rank waits for another. ``local.refresh()`` (collective) must follow when every rank has succeeded; after a
    failure the state is part old, part new, and must be loaded from elsewhere. A checkpoint without averages gives ``ema``
    the weights. Returns the bytes read.

    Raises:
        UserError: the checkpoint is of another model; nothing has been changed.
        Damaged: a file is not as it was written.
    """
    check_fits(local.parameters, manifest, local.buffers())
    index = Index(folder, manifest, verify=verify)
    local.begin_write()
    local.create_moments({n: p.opt_step or 0 for n, p in manifest.parameters.items()})
    states: list[str] = ["param", *MOMENTS]
    if ema is not None and "ema" in manifest.states:
        states.append("ema")
    spans: list[Span] = []
    for state in states:
        for fragment in local.fragments:
            tensor = local.tensor(fragment, state, ema)
            if tensor is None:
                continue
            for place, lo, hi in index.overlap(state, fragment.name, fragment.start, fragment.numel):
                begin = place.begin + 4 * (lo - place.piece.start)
                target = (tensor, fragment.offset + lo - fragment.start)
                spans.append(Span(place.file, begin, begin + 4 * (hi - lo), target))
    count = 0
    for (tensor, offset), at, data in stream(index.files, spans, verify=verify):
        fragments.write(tensor, offset + at // 4, torch.frombuffer(data, dtype=torch.float32))
        count += len(data)
    if ema is not None and "ema" not in manifest.states:
        for average, master in zip(ema, local.masters):
            average.copy_(master.detach())
    for name, buffer in local.buffers().items():
        value = index.buffer(name)
        if value.numel() != math.prod(buffer.shape):
            raise Damaged(f"buffer {name} has {value.numel()} elements, not {buffer.numel()}")
        buffer.copy_(value.reshape(buffer.shape))
    local.set_scalars(manifest.engine)
    return count
