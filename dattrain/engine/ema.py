"""Exponential moving average of the weights, on this rank's fp32 masters: no gather, no second model.

Equal to an unsharded average bit for bit, since it is elementwise. It is saved with the other fragments, so it follows a
run to any world size and ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from dattrain.state.partition import LocalState, averaged, lerp_ema


class Ema:
    """``average = decay * average + (1 - decay) * weights`` after every update that was applied."""

    def __init__(self, engine: Any, decay: float) -> None:
        self.decay = decay
        self._engine = engine
        self._masters = LocalState(engine)
        self.tensors: list[Tensor] = self._masters.new_ema()
        """One average per local fp32 master, in ``LocalState.masters``' order: what a checkpoint saves and restores."""

    def update(self) -> None:
        """Call once per applied update."""
        lerp_ema(self.tensors, self._masters.masters, self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the module computes with the averages; afterwards the weights are what they were, bit for bit."""
        with averaged(self._engine, self.tensors):
            yield
