"""What modules had to do and what the device can do: FLOPs and bytes of forward passes against measured ceilings."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Count = Callable[[nn.Module, tuple[Any, ...], Any], int]
"""Multiply-accumulates of a call of a module itself, without what is inside it, from its inputs and output."""


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches: FLOPs per second in a matrix product, bytes per second in a copy (read and written)."""

    flops: float
    bytes: float
    dtype: torch.dtype

    def seconds(self, flops: float, moved: float) -> float:
        """The least that so much work can take (the roofline of Williams et al. 2009)."""
        return max(flops / self.flops, moved / self.bytes)


def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Ceilings of this device with the current number of threads; a fraction of a second.

    On random data: GPUs multiply constant matrices faster, since fewer bits switch and so clocks stay higher. The numbers
    come from a generator of their own, so that a run which is profiled draws what it would have drawn.
    """
    cuda = device.type == "cuda"
    side, count = (8192, 2**28) if cuda else (1024, 2**24)
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(side, side, generator=generator, device=device).to(dtype)
    source = torch.randn(count, generator=generator, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return Ceilings(
        2 * side**3 / _fastest(lambda: a @ a, cuda),
        2 * 4 * count / _fastest(lambda: target.copy_(source), cuda),
        dtype,
    )


def _fastest(call: Callable[[], object], cuda: bool) -> float:
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


class Work:
    """FLOPs and bytes of forward passes by module name."""

    def __init__(self, count: Count) -> None:
        self._count = count
        self._own: dict[str, list[tuple[int, int]]] = defaultdict(list)

    def add(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """One call. Bytes are of inputs, output and parameters, each moved once; of what only holds others, none."""
        x = next((each for each in inputs if isinstance(each, Tensor)), None)
        if x is None or not isinstance(output, Tensor) or output is x:
            return
        flops = 2 * self._count(module, inputs, output)
        leaf = next(module.children(), None) is None
        moved = x.nbytes + output.nbytes if leaf or flops else 0
        if leaf:
            # A parameter that ZeRO-3 has partitioned says how large it is when it is gathered.
            moved += sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in module.parameters())
        self._own[name].append((flops, moved))

    def inside(self, name: str, ceilings: Ceilings) -> tuple[float, float, float]:
        """(FLOPs, bytes, least seconds) of a module's calls with everything inside it."""
        calls = [
            call
            for other, own in self._own.items()
            if other == name or other.startswith(name + ".")
            for call in own
        ]
        return (
            sum(flops for flops, _ in calls),
            sum(moved for _, moved in calls),
            sum(ceilings.seconds(*call) for call in calls),
        )
