"""torch.compile per block or stage, and CUDA graphs of that. What cannot be had is left out, with one line that says so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import nn

from dattrain.errors import UserError
from dattrain.models.dense.backbone import TimmBackbone

log = logging.getLogger(__name__)


def apply(
    model: nn.Module,
    unit: Literal["none", "block", "stage"],
    *,
    graphs_on: str | None = None,
    training_only: bool = False,
) -> int:
    """Compile the blocks or stages of ``model``, or of its backbone's body, in place (names stay); returns how many.

    Nothing is compiled before its first call; if that fails all of them run uncompiled from there on.

    With ``graphs_on="cuda"`` what is compiled is recorded and replayed as CUDA graphs, by inductor's graph trees: parameters
    stay where they are, and a call of ``model`` begins a generation, so that outputs and gradients from before it must not
    be read any more. On another type of device a line says that there are none.

    Args:
        training_only: in evaluation run uncompiled, where images come in so many sizes that compiling would never end.

    Raises:
        UserError: the network's stages are not called as modules, so that compiling them would do nothing.
    """
    if unit == "none":
        return 0
    import torch._functorch.config as functorch

    # Otherwise a backward pass is compiled when it is first run, where nothing can take over any more.
    functorch.force_non_lazy_backward_lowering = True
    # A graph for each kind and shape of block, in training, in evaluation and for its last batch: some two dozen, more than
    # torch keeps by default, beyond which it would run uncompiled. Each image size of a run adds as many.
    torch._dynamo.config.recompile_limit = max(128, torch._dynamo.config.recompile_limit)
    targets = list(_units(model, unit))
    if graphs_on not in (None, "cuda"):
        log.warning("train.cuda_graphs: the device is %s; what is compiled runs without", graphs_on)
    replay = graphs_on == "cuda"
    switch = _Switch(unit, "reduce-overhead" if replay else None)
    for module in targets:
        module.forward = switch.guard(module, training_only)
    if replay:
        model.register_forward_pre_hook(_Generations())
    return len(targets)


def _units(model: nn.Module, unit: str) -> Iterator[nn.Module]:
    backbone = getattr(model, "backbone", None)
    body = model if backbone is None else backbone.body
    if unit == "stage" and isinstance(backbone, TimmBackbone):
        raise UserError(
            f"train.compile=stage is for DAT, whose stages are modules that are called; choose block or none for {backbone.name}"
        )
    stages: Any = body.layers if hasattr(body, "layers") else body.stages
    for stage in stages:
        if unit == "stage":
            yield stage
        else:
            yield from stage.blocks


class _Switch:
    """Compiled calls until the first one fails to compile; from then on, plain ones."""

    def __init__(self, unit: str, mode: str | None) -> None:
        self._unit, self._mode = unit, mode
        self.failed = False

    def guard(self, module: nn.Module, training_only: bool) -> Callable[..., Any]:
        forward = module.forward
        # Stages differ in shape, which by default makes torch go over to symbolic shapes from the second on: slower code,
        # and reshapes that it cannot always compile.
        compiled = torch.compile(forward, dynamic=False, mode=self._mode)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.failed or (training_only and not module.training):
                return forward(*args, **kwargs)
            try:
                return compiled(*args, **kwargs)
            except _errors() as error:
                self.failed = True
                log.warning(
                    "train.compile=%s: torch.compile failed (%s); training continues uncompiled",
                    self._unit,
                    _reason(error),
                )
                return forward(*args, **kwargs)

        return call


class _Generations:
    """A forward pre-hook of the model: a new generation of graphs per call; says once what inductor left without graphs."""

    def __init__(self) -> None:
        self._calls = 0

    def __call__(self, *_: Any) -> None:
        from torch._dynamo.utils import counters

        compiler: Any = torch.compiler  # untyped
        compiler.cudagraph_mark_step_begin()
        self._calls += 1
        skipped = counters["inductor"]["cudagraph_skips"]
        if self._calls == 2 and skipped:
            log.warning(
                "train.cuda_graphs: %d compiled graphs run without (TORCH_LOGS=perf_hints says why)", skipped
            )


def _reason(error: Exception) -> str:
    """The line that says what happened: torch's first one may only say who raised."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith(" raised:")]
    return lines[0].strip() if lines else type(error).__name__


def _errors() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return (TorchDynamoException, InductorError)
