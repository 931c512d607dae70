"""Full tensors out of a checkpoint, one after another: for evaluation, prediction, export and fine-tuning.

Needs neither the ranks that wrote it nor DeepSpeed. Tensors come in groups of at most ``GROUP`` bytes (or one that is larger):
for each the rank files are opened one after another, and no more than one at a time, however many there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dattrain.errors import Damaged, UserError
from dattrain.state import load
from dattrain.state.format import checkpoint
from dattrain.state.format.manifest import Manifest
from dattrain.state.format.prefetch import Span, prefetch
from dattrain.state.format.rank_file import Pieces

GROUP = 512 << 20
"""Bytes of tensors that are put together in one pass over the rank files."""
State = Literal["param", "exp_avg", "exp_avg_sq", "ema"]


def iter_tensors(
    folder: Path, state: State = "param", *, names: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for every parameter in the model's order: fp32, on the host, of the parameter's shape.

    Args:
        folder: a checkpoint (``step_...``), or a run folder, which means its newest complete one.
        state: what to gather. ``ema`` takes the weights of frozen parameters, which do not move; moments leave them out.
        names: read these alone.

    Raises:
        UserError: there is no complete checkpoint, it holds no such state, or it turns out to be damaged on the way.
    """
    folder = checkpoint.locate(Path(folder))
    try:
        manifest = checkpoint.check(folder)
        if state not in manifest.states:
            raise UserError(f"{folder} holds {', '.join(manifest.states)}, but no {state}")
        wanted = None if names is None else set(names)
        sources = {
            name: state if parameter.trainable else "param"
            for name, parameter in manifest.parameters.items()
            if (wanted is None or name in wanted) and (parameter.trainable or state in ("param", "ema"))
        }
        for group in _groups(manifest, sources):
            yield from _full(folder, manifest, {(sources[name], name) for name in group})
    except Damaged as e:
        raise UserError(f"{folder} is damaged: {e}") from e


def _groups(manifest: Manifest, names: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name in names:
        nbytes = 4 * manifest.parameters[name].numel
        if group and size + nbytes > GROUP:
            yield group
            group, size = [], 0
        group.append(name)
        size += nbytes
    if group:
        yield group


def _full(folder: Path, manifest: Manifest, wanted: set[tuple[str, str]]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every (state, name) that is ``wanted``, in the model's order: one pass over the rank files."""
    state_of = {name: state for state, name in wanted}
    tensors = {name: torch.empty(p.numel) for name, p in manifest.parameters.items() if name in state_of}
    runs: dict[str, list[tuple[int, int]]] = {name: [] for name in tensors}

    def choose(pieces: Pieces) -> list[Span]:
        spans = []
        for (state, name), found in pieces.items():
            if (state, name) in wanted:
                for piece, begin in found:
                    end = piece.start + piece.numel
                    if piece.dtype != "F32" or not 0 <= piece.start <= end <= tensors[name].numel():
                        raise Damaged(load.uncovered(state, name, tensors[name].numel()))
                    if piece.numel:
                        runs[name].append((piece.start, end))
                    spans.append(Span(begin, begin + piece.nbytes, (name, piece.start)))
        return spans

    files = [(folder / name, digest) for name, digest in manifest.files.items()]
    with prefetch(files, choose) as found:
        for _, parts in found:
            for (name, start), at, data in parts:
                first = start + at // 4
                tensors[name][first : first + len(data) // 4] = torch.frombuffer(data, dtype=torch.float32)
    for name in list(tensors):
        tensor = tensors.pop(name)
        if not load.exactly(0, tensor.numel(), runs[name]):
            raise Damaged(load.uncovered(state_of[name], name, tensor.numel()))
        yield name, tensor.reshape(manifest.parameters[name].shape)


def load_tensors(folder: Path, state: State = "param") -> dict[str, Tensor]:
    """All of ``iter_tensors`` and the buffers: a state dict in fp32 (buffers in their own dtype)."""
    folder = checkpoint.locate(Path(folder))
    tensors = dict(iter_tensors(folder, state))
    if state in ("param", "ema"):
        tensors.update(load_buffers(folder))
    return tensors


def load_buffers(folder: Path) -> dict[str, Tensor]:
    """The buffers of a checkpoint, in their own dtype. Raises UserError."""
    folder = checkpoint.locate(Path(folder))
    try:
        manifest = checkpoint.check(folder)
        files = [(folder / name, digest) for name, digest in manifest.files.items()]
        return load.read_buffers(files, manifest.buffers, verify=True)
    except Damaged as e:
        raise UserError(f"{folder} is damaged: {e}") from e
