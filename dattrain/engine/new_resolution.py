"""Resuming at a new resolution: a session is filled from a checkpoint of another image size (``train.progressive``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dattrain.config.schema import Config
from dattrain.runtime import collectives
from dattrain.state import gather, partition
from dattrain.state.format import checkpoint
from dattrain.state.format.manifest import Manifest
from dattrain.state.partition import MOMENTS, LocalState
from dattrain.tasks.base import Size, Task


def size_at(config: Config, samples_seen: int, samples_per_epoch: int) -> Size:
    """Image size of the update that begins at ``samples_seen``."""
    size: Size = config.model.img_size
    for phase in config.train.progressive:
        # Epochs are fractions; a phase begins with the first update at or after it.
        if samples_seen >= phase.epoch * samples_per_epoch - 0.5:
            size = phase.img_size
    return size


@torch.no_grad()
def resume_at_new_resolution(
    engine: Any, ema_tensors: list[Tensor] | None, task: Task, img_size: Size, folder: Path
) -> Manifest:
    """Fill ``engine`` and ``ema_tensors`` from a checkpoint of another image size. Collective.

    Rank 0 reads all of it and sends it to the others. Weights and averages are resized as ``init.bias_table`` says. The moments of
    a table that was resized begin anew: the first at zero, the second at its mean over each head, so that no element's first
    steps are out of proportion.
    """
    manifest = collectives.from_first(lambda: checkpoint.check(folder))
    local = LocalState(engine)
    local.begin_write()
    local.create_moments(
        {name: p.opt_step or 0 for name, p in manifest.parameters.items() if name in local.parameters}
    )
    states: list[gather.State] = ["param", *MOMENTS]
    if ema_tensors is not None:
        states.append("ema" if "ema" in manifest.states else "param")
    for position, state in enumerate(states):
        target = "ema" if position == 3 else state
        for name, tensor in _resized(task, img_size, local, folder, state):
            for fragment in local.fragments:
                if fragment.name != name:
                    continue
                own = local.tensor(fragment, target, ema_tensors)
                if own is not None:
                    values = tensor.reshape(-1)[fragment.start : fragment.start + fragment.numel]
                    partition.write(own, fragment.offset, values.to(own.device))
    buffers = local.buffers()
    for name, value in collectives.tensors_from_first(lambda: gather.load_buffers(folder).items()):
        if name in buffers and buffers[name].shape == value.shape:
            buffers[name].copy_(value)
    local.set_scalars(manifest.engine)
    local.refresh()
    return manifest


def _resized(
    task: Task, img_size: Size, local: LocalState, folder: Path, state: gather.State
) -> Iterator[tuple[str, Tensor]]:
    tensors = collectives.tensors_from_first(lambda: gather.iter_tensors(folder, state))
    if state in ("param", "ema"):
        yield from task.resize(dict(tensors), img_size)
        return
    for name, tensor in tensors:
        shape = local.parameters[name].shape
        if tuple(tensor.shape) != shape:
            mean = tensor.mean(dim=(1, 2), keepdim=True)
            tensor = torch.zeros(shape) if state == "exp_avg" else mean.expand(shape).contiguous()
        yield name, tensor
