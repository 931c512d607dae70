"""Exponential moving average of the weights, on this rank's fp32 masters: no gather, no second model.

Equal to an unsharded average bit for bit, since it is elementwise. It is saved with the other fragments, so it follows a
run to any world size and ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from dattrain.state.partition import LocalState


class Ema:
    """``average = decay * average + (1 - decay) * weights`` after every update that was applied."""

    def __init__(self, engine: Any, decay: float) -> None:
        self.decay = decay
        self._engine = engine
        self._masters = LocalState(engine)
        self.tensors: list[Tensor] = new_average(self._masters.masters)
        """One average per local fp32 master, in ``LocalState.masters``' order: what a checkpoint saves and restores."""

    def update(self) -> None:
        """Move the averages towards the weights; call once per applied update."""
        update_average(self.tensors, self._masters.masters, self.decay)

    def applied(self) -> AbstractContextManager[None]:
        """Within it the module computes with the averages; afterwards the weights are what they were, bit for bit."""
        return averaged(self._engine, self.tensors)


def new_average(masters: list[Tensor]) -> list[Tensor]:
    """An average that starts at ``masters``: one tensor like each."""
    return [m.detach().clone(memory_format=torch.preserve_format) for m in masters]


@torch.no_grad()
def update_average(average: list[Tensor], masters: list[Tensor], decay: float) -> None:
    """``average = decay * average + (1 - decay) * masters``, in place, local, in few kernels. Elementwise, so exact under sharding."""
    torch._foreach_lerp_(average, [m.detach() for m in masters], 1.0 - decay)


@contextmanager
def averaged(engine: Any, average: list[Tensor]) -> Iterator[None]:
    """Make the module compute with ``average``. Collective on entry and exit; needs one more master at a time."""
    state = LocalState(engine)

    @torch.no_grad()
    def swap() -> None:
        state.begin_write()
        for master, mean in zip(state.masters, average, strict=True):
            weights = master.detach().clone()
            master.data.copy_(mean)
            mean.copy_(weights)
        state.refresh()

    swap()
    try:
        yield
    finally:
        swap()
