"""The deformable core, every backend against the straightforward formulation.

Time forward and forward with backward, and the bytes that autograd keeps in between. The baseline is
``benchmarks/straightforward.py`` of the source tree, or the reference backend where that is not there.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import dattrain
from dattrain import ops
from dattrain.bench import common
from dattrain.bench.device import DeviceClock
from dattrain.errors import UserError
from dattrain.runtime.environment import device_called

BATCHES = {"cpu": (8, 2), "cuda": (128, 32)}
"""Images at 14 x 14 and at 24 x 24: on CUDA the micro-batches of DAT-T at 224 and of DAT-B at 384 pixels, so that it is the device
that takes the time and not Python."""


def bench(
    *,
    sizes: Sequence[int],
    batches: Sequence[int] | None,
    heads: int,
    groups: int,
    dim: int,
    dtypes: Sequence[str],
    grids: Sequence[str],
    passes: Sequence[str],
    backends: Sequence[str] | None,
    compile: bool,
    device: torch.device,
    rounds: int,
) -> common.BenchReport:
    """Time every case.

    Args:
        sizes: sides of the map.
        batches: images, one number per size or one for all; None takes ``BATCHES``.
        heads: attention heads.
        groups: offset groups.
        dim: channels of a head.
        dtypes: of ``defaults.DTYPES``.
        grids: ``center`` and ``corner``.
        passes: ``forward`` and ``both`` (with backward).
        backends: of ``dattrain.ops``; None takes all that run here but the reference.
        compile: add the straightforward formulation under ``torch.compile``.
        device: where.
        rounds: turns of each contender.

    Raises:
        UserError: a backend that is not available here.
    """
    usual = list(BATCHES[device.type])
    batches = list(batches or (usual if len(sizes) == len(usual) else usual[:1]))
    running = [status.name for status in ops.backends() if status.available]
    backends = backends or [
        name
        for name in running
        if name != "reference" and name != ("native" if device.type == "cuda" else "triton")
    ]
    for name in backends:
        if name not in running:
            raise UserError(f"--backends {name}: not available here; there are {', '.join(running)}")
    plain = straightforward()
    measurements: list[common.Measurement] = []
    notes: list[str] = []
    for size, batch in zip(sizes, batches * len(sizes) if len(batches) == 1 else batches):
        for grid in grids:
            for dtype in dtypes:
                # Each case is a graph of its own, and torch keeps a few per function: what came after them would run
                # uncompiled.
                torch._dynamo.reset()
                inputs = draw(size, batch, heads, groups, dim, to_dtype(dtype), device)
                calls: dict[str, Callable[..., torch.Tensor]] = {}
                if plain is not None:
                    calls["straightforward"] = plain.deform_attention
                    if compile:
                        compiled = try_compile(plain.deform_attention, notes, warm=(inputs, size, grid))
                        calls |= {"straightforward, compiled": compiled} if compiled else {}
                else:
                    calls["reference"] = with_backend(ops.deform_attention, "reference")
                calls |= {name: with_backend(ops.deform_attention, name) for name in backends}
                for direction in passes:
                    case = f"{size}x{size} B{batch} {grid} {dtype} {'forward' if direction == 'forward' else 'forward+backward'}"
                    measurements += measure(
                        case, calls, inputs, size, grid, direction == "both", rounds, notes
                    )
    return common.BenchReport(
        f"Deformable attention core, {heads} heads of {dim}, {groups} groups",
        measurements,
        item="image",
        notes=notes,
        machine=common.describe_machine(str(device)),
    )


def measure(
    case: str,
    calls: Mapping[str, Callable[..., torch.Tensor]],
    inputs: tuple[torch.Tensor, ...],
    size: int,
    grid: str,
    backward: bool,
    rounds: int,
    notes: list[str],
    min_seconds: float = 0.05,
) -> list[common.Measurement]:
    """The calls in turns, the first the baseline. On CUDA their times are the device's own: see ``DeviceClock``."""
    steps = {name: step(call, inputs, size, grid, backward) for name, call in calls.items()}
    batch, device = inputs[0].shape[0], inputs[0].device
    extra: dict[str, dict[str, float | str | None]] = {}
    if backward:
        extra = {
            name: {"MB kept/image": kept_bytes(call, inputs, size, grid) / 1e6 / batch}
            for name, call in calls.items()
        }
    keywords: dict[str, Any] = {}
    if device.type == "cuda":
        clock = DeviceClock(device)
        steps = {name: clock.timed(one, f"{case}, {name}", notes) for name, one in steps.items()}
        keywords["clock"] = clock
    return common.compare(
        case,
        steps,
        baseline=next(iter(calls)),
        rounds=rounds,
        min_seconds=min_seconds,
        items=batch,
        extra=extra,
        **keywords,
    )


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = device_called(name)
    # With its index, which ``torch.cuda.set_device`` wants.
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else device


def to_dtype(name: str) -> torch.dtype:
    """The dtype that a recipe calls so."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def straightforward() -> ModuleType | None:
    """``benchmarks/straightforward.py`` of the source tree that this package runs from, if it does."""
    path = Path(dattrain.__file__).parents[1] / "benchmarks" / "straightforward.py"
    spec = importlib.util.spec_from_file_location("dattrain_straightforward", path)
    if not path.is_file() or spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw(
    size: int,
    batch: int,
    heads: int,
    groups: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    keys: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """q, k, v, positions (the grid moved by up to a pixel), table: leaves that require gradients.

    q, k and v are views of tokens, B x length x heads x d and B x length x 2 x heads x d in memory, as the model makes them.

    Args:
        size: side of the map of queries, for which the table is laid out.
        keys: side of the map of keys; that of the queries when None.
    """
    generator = torch.Generator().manual_seed(0)
    side = keys or size
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    points = (
        torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
        .view(1, 1, -1, 2)
        .repeat(batch, groups, 1, 1)
    )
    points += (torch.rand(points.shape, generator=generator) * 2 - 1) * 2 / side
    tokens = torch.randn(batch, size * size, heads, dim, generator=generator).to(device, dtype)
    pairs = torch.randn(batch, side * side, 2, heads, dim, generator=generator).to(device, dtype)
    k, v = pairs.permute(2, 0, 3, 1, 4)
    table = torch.randn(heads, 2 * size - 1, 2 * size - 1, generator=generator) * 0.02
    leaves = (tokens.transpose(1, 2), k, v, points.to(device), table.to(device))
    return tuple(x.detach().requires_grad_() for x in leaves)


def with_backend(function: Callable[..., torch.Tensor], backend: str) -> Callable[..., torch.Tensor]:
    """``function`` with that backend."""
    return functools.partial(function, backend=backend)


def step(
    call: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], size: int, grid: str, backward: bool
) -> Callable[[], Any]:
    """One turn: forward without gradients, or forward and all gradients."""
    batch, heads, queries, dim = inputs[0].shape
    tokens = torch.randn(batch, queries, heads, dim, generator=torch.Generator().manual_seed(1))
    cotangent = tokens.to(inputs[0]).transpose(1, 2)

    def both() -> Any:
        out = call(*inputs, height=size, width=size, query_grid=grid)
        return torch.autograd.grad(out, inputs, cotangent)

    @torch.no_grad()
    def forward() -> Any:
        return call(*inputs, height=size, width=size, query_grid=grid)

    return both if backward else forward


def kept_bytes(
    call: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], size: int, grid: str
) -> int:
    """Bytes of the storages that autograd keeps between forward and backward, each counted once."""
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = call(*inputs, height=size, width=size, query_grid=grid)
    total = sum(kept.values())
    del out
    return total


def leaves_like(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Copies to try something with, that leave no trace on the originals.

    A graph that outlives its call ties a leaf's gradient to the stream of that call; then it cannot be captured on another.
    """
    return tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)


def try_compile(
    function: Callable[..., torch.Tensor], notes: list[str], warm: tuple[tuple[torch.Tensor, ...], int, str]
) -> Callable[..., torch.Tensor] | None:
    """Compiled and run once; on failure a line in ``notes`` that says why, and None."""
    compiled = torch.compile(function, dynamic=False, fullgraph=True)
    inputs, size, grid = warm
    try:
        step(compiled, leaves_like(inputs), size, grid, True)()
    except Exception as error:
        notes.append(f"torch.compile failed, left out: {type(error).__name__}: {str(error).splitlines()[0]}")
        return None
    return compiled
