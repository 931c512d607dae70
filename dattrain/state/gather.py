"""Whole tensors out of a checkpoint, one after another: for evaluation, prediction, export and fine-tuning.

Needs neither the ranks that wrote it nor DeepSpeed. Memory is one tensor and a few blocks per shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dattrain.errors import UserError
from dattrain.state import checkpoint
from dattrain.state.elastic import Index
from dattrain.state.shards import Damaged, Reader

State = Literal["param", "exp_avg", "exp_avg_sq", "ema"]


def iter_tensors(
    folder: Path, state: State = "param", *, verify: bool = True, names: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for every parameter in the model's order: fp32, on the host, of the parameter's shape.

    Args:
        folder: a checkpoint (``step_...``), or a run folder, which means its newest whole one.
        state: what to gather. ``ema`` takes the weights of frozen parameters, which do not move; moments leave them out.
        verify: whether to check checksums of what is read.
        names: read these alone.

    Raises:
        UserError: there is no whole checkpoint, it holds no such state, or it turns out to be damaged on the way.
    """
    folder = checkpoint.locate(Path(folder))
    try:
        manifest = checkpoint.check(folder)
        if state not in manifest.states:
            raise UserError(f"{folder} holds {', '.join(manifest.states)}, but no {state}")
        index = Index(folder, manifest, verify=verify)
        wanted = None if names is None else set(names)
        with ExitStack() as stack:
            readers = [stack.enter_context(Reader(*file, verify=verify)) for file in index.files]
            for name, parameter in manifest.parameters.items():
                if wanted is not None and name not in wanted:
                    continue
                source = state if parameter.trainable else "param"
                if source != state and state != "ema":
                    continue
                full = torch.empty(parameter.numel, dtype=torch.float32)
                for place, lo, hi in index.overlap(source, name, 0, parameter.numel):
                    data = readers[place.file].read(place.begin, 4 * (hi - lo))
                    full[lo:hi] = torch.frombuffer(data, dtype=torch.float32)
                yield name, full.reshape(parameter.shape)
    except Damaged as e:
        raise UserError(f"{folder} is damaged: {e}") from e


def load_tensors(folder: Path, state: State = "param", *, verify: bool = True) -> dict[str, Tensor]:
    """All of ``iter_tensors`` and the buffers: a state dict in fp32 (buffers in their own dtype)."""
    folder = checkpoint.locate(Path(folder))
    tensors = dict(iter_tensors(folder, state, verify=verify))
    if state in ("param", "ema"):
        tensors.update(load_buffers(folder, verify=verify))
    return tensors


def load_buffers(folder: Path, *, verify: bool = True) -> dict[str, Tensor]:
    """The buffers of a checkpoint, in their own dtype. Raises UserError."""
    folder = checkpoint.locate(Path(folder))
    try:
        manifest = checkpoint.check(folder)
        index = Index(folder, manifest, verify=verify)
        return {name: index.buffer(name) for name in manifest.buffers}
    except Damaged as e:
        raise UserError(f"{folder} is damaged: {e}") from e
