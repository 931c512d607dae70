"""Profiling of a few updates: a trace, a table per module, and on CUDA a snapshot of the memory.

The trace is for Perfetto; the table holds each module against the device's measured ceilings. Modules are timed by hooks that open a named range, so the table comes out of the same trace. A backward range runs from the
gradient of a module's output to that of its input.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from dattrain.observe import roofline
from dattrain.observe.roofline import Ceilings, Count, Work

FORWARD, BACKWARD = "forward/", "backward/"

log = logging.getLogger(__name__)


class Profiler:
    """Profiles updates [first, last) on this rank into ``folder``. None for ``steps`` does nothing at all.

    Args:
        dtype: of the matrix products, for the ceiling.
        count: see ``roofline.Count``.
    """

    def __init__(
        self,
        steps: tuple[int, int] | None,
        folder: Path,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
        count: Count,
    ) -> None:
        self._steps, self._folder, self._rank, self._device = steps, folder, rank, device
        self._dtype, self._work = dtype, Work(count)
        self._ceilings: Ceilings | None = None
        self._profile: Any = None
        self._hooks: list[Any] = []

    @contextmanager
    def step(self, step: int, model: nn.Module) -> Iterator[None]:
        """Around the 0-based update ``step``."""
        if self._steps is None or not self._steps[0] <= step < self._steps[1]:
            yield
            return
        if self._profile is None:
            self._start(model)
        with record_function(f"update {step}"):
            yield
        if step + 1 >= self._steps[1]:
            self.finish()

    def _start(self, model: nn.Module) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        self._ceilings = roofline.measure(self._device, self._dtype)
        self._hooks = watch(model, self._work)
        self._profile = cast(Any, profile(activities=activities))
        self._profile.__enter__()

    def finish(self) -> None:
        """Write what was recorded; also where training ends within the range."""
        if self._profile is None:
            return
        self._profile.__exit__(None, None, None)
        for hook in self._hooks:
            hook.remove()
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / f"rank_{self._rank}.trace.json.gz"
        self._profile.export_chrome_trace(str(trace))
        assert self._ceilings is not None
        text = table(self._profile.key_averages(), self._work, self._ceilings)
        (self._folder / f"rank_{self._rank}.modules.txt").write_text(text, encoding="utf-8")
        if self._device.type == "cuda":
            dump: Any = torch.cuda.memory._dump_snapshot
            dump(str(self._folder / f"rank_{self._rank}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile, self._hooks = None, []
        log.info("profile written to %s", self._folder)


def watch(model: nn.Module, work: Work) -> list[Any]:
    """Hooks that open a range for every module with a name of its own and note its work; returns their handles."""
    handles = []
    for name, module in model.named_modules():
        if name and not isinstance(module, (nn.Identity, nn.ModuleList, nn.Sequential)):
            handles += _ranges(name, module, work)
    return handles


def _ranges(name: str, module: nn.Module, work: Work) -> list[Any]:
    opened: dict[str, list[Any]] = defaultdict(list)

    def enter(prefix: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            range_ = cast(Any, record_function(prefix + name))
            range_.__enter__()
            opened[prefix].append(range_)

        return hook

    def leave(prefix: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if opened[prefix]:
                opened[prefix].pop().__exit__(None, None, None)

        return hook

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        work.add(name, module, inputs, output)

    return [
        module.register_forward_pre_hook(enter(FORWARD)),
        module.register_forward_hook(note),
        module.register_forward_hook(leave(FORWARD), always_call=True),
        module.register_full_backward_pre_hook(enter(BACKWARD)),
        module.register_full_backward_hook(leave(BACKWARD)),
    ]


def table(averages: Any, work: Work, ceilings: Ceilings) -> str:
    """Lines per module: calls, milliseconds, FLOPs, bytes and the share of the roofline.

    Milliseconds are forward and backward, on the host and (where there is one) on the device; FLOPs and bytes are those of
    the forward passes; the share is the least time for them over the time that they took.
    """
    rows: dict[str, dict[str, Any]] = defaultdict(lambda: {FORWARD: None, BACKWARD: None})
    for event in averages:
        for prefix in (FORWARD, BACKWARD):
            if event.key.startswith(prefix):
                rows[event.key.removeprefix(prefix)][prefix] = event
    width = max((len(name) for name in rows), default=6)
    head = f"{'module':{width}}  {'calls':>5}  {'fwd ms':>9}  {'bwd ms':>9}  {'fwd device ms':>13}  {'bwd device ms':>13}"
    lines = [f"{head}  {'fwd GFLOP':>9}  {'fwd MB':>9}  {'of bound':>8}"]
    for name, pair in sorted(rows.items(), key=lambda item: -_total(item[1])):
        forward, backward = pair[FORWARD], pair[BACKWARD]
        cells = [_ms(e, "cpu_time_total") for e in (forward, backward)]
        cells += [_ms(e, "device_time_total") for e in (forward, backward)]
        calls = forward.count if forward else backward.count
        flops, moved, least = work.inside(name, ceilings)
        took = cells[2] or cells[0]
        share = f"{100 * least * 1e3 / took:7.0f}%" if took else f"{'':8}"
        lines.append(
            f"{name:{width}}  {calls:5}  {cells[0]:9.3f}  {cells[1]:9.3f}  {cells[2]:13.3f}  {cells[3]:13.3f}"
            f"  {flops / 1e9:9.3f}  {moved / 1e6:9.1f}  {share}"
        )
    kind = str(ceilings.dtype).removeprefix("torch.")
    lines.append(
        f"Ceilings measured on this device: {ceilings.flops / 1e9:.0f} GFLOP/s ({kind} matrix product), "
        f"{ceilings.bytes / 1e9:.0f} GB/s (copy). Bound: the larger of FLOPs and bytes over these, added up over what is inside; "
        "each operation by itself, so what is fused may exceed it. Backward has about twice the work."
    )
    return "\n".join(lines) + "\n"


def _total(pair: dict[str, Any]) -> float:
    return sum(_ms(e, "cpu_time_total") + _ms(e, "device_time_total") for e in pair.values())


def _ms(event: Any, field: str) -> float:
    return getattr(event, field, 0.0) / 1e3 if event is not None else 0.0
