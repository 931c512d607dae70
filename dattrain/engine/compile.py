"""torch.compile per block or stage. What cannot be compiled runs as it is, with one line that says so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal

from torch import nn

log = logging.getLogger(__name__)


def apply(model: nn.Module, unit: Literal["none", "block", "stage"]) -> int:
    """Compile the blocks or stages of ``model`` in place (names stay); returns how many. Nothing is compiled before its
    first call; if that fails all of them go on uncompiled.
    """
    if unit == "none":
        return 0
    import torch

    # One graph per shape of a block, and there are two or three shapes per stage: more than torch keeps by default.
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    targets = list(_units(model, unit))
    switch = _Switch(unit)
    for module in targets:
        module.forward = switch.guard(module.forward)
    return len(targets)


def _units(model: nn.Module, unit: str) -> Iterator[nn.Module]:
    stages: Any = model.stages
    for stage in stages:
        if unit == "stage":
            yield stage
        else:
            yield from stage.blocks


class _Switch:
    """Compiled calls until the first one fails to compile; from then on, plain ones."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self.failed = False

    def guard(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        compiled = torch.compile(forward)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.failed:
                return forward(*args, **kwargs)
            try:
                return compiled(*args, **kwargs)
            except _errors() as error:
                self.failed = True
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                log.warning(
                    "train.compile=%s: torch.compile failed (%s); training goes on uncompiled",
                    self._unit,
                    reason,
                )
                return forward(*args, **kwargs)

        return call


def _errors() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return (TorchDynamoException, InductorError)
