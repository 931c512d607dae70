"""``dattrain bench attention``: the deformable core, every backend against the straightforward formulation.

Time forward and forward with backward, and the bytes that autograd keeps in between. The baseline is
``benchmarks/straightforward.py`` of the source tree, or the reference backend where that is not there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dattrain.errors import UserError
from dattrain.tools.bench import common

if TYPE_CHECKING:
    import torch

DTYPES = ("fp32", "bf16", "fp16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Shapes default to DAT-T's third stage at 224 and 384 pixels."""
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[14, 24], metavar="N", help="sides of the map (14 24)"
    )
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[8, 2], metavar="B", help="images, per size (8 2)"
    )
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--dim", type=int, default=32, help="channels of a head")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--grids", nargs="+", choices=("center", "corner"), default=["center", "corner"])
    parser.add_argument("--passes", nargs="+", choices=("forward", "both"), default=["forward", "both"])
    parser.add_argument(
        "--backends", nargs="+", help="of dattrain.ops (default: all that run here but the reference)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="add the straightforward formulation under torch.compile"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    common.add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; 0."""
    import torch

    from dattrain import ops

    if len(args.batch) not in (1, len(args.sizes)):
        raise UserError(
            f"--batch has {len(args.batch)} values for {len(args.sizes)} sizes; give one, or one per size"
        )
    device = pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    running = [status.name for status in ops.backends() if status.available]
    backends = args.backends or [
        name for name in running if name != "reference" and (name != "triton" or device.type == "cuda")
    ]
    for name in backends:
        if name not in running:
            raise UserError(f"--backends {name}: not available here; there are {', '.join(running)}")
    plain = straightforward()
    measurements: list[common.Measurement] = []
    notes: list[str] = []
    batches = args.batch * len(args.sizes) if len(args.batch) == 1 else args.batch
    for size, batch in zip(args.sizes, batches):
        for grid in args.grids:
            for dtype in args.dtypes:
                inputs = draw(size, batch, args.heads, args.groups, args.dim, to_dtype(dtype), device)
                calls: dict[str, Callable[..., torch.Tensor]] = {}
                if plain is not None:
                    calls["straightforward"] = plain.deform_attention
                    if args.compile:
                        compiled = try_compile(plain.deform_attention, notes, warm=(inputs, size, grid))
                        calls |= {"straightforward, compiled": compiled} if compiled else {}
                else:
                    calls["reference"] = with_backend(ops.deform_attention, "reference")
                calls |= {name: with_backend(ops.deform_attention, name) for name in backends}
                for direction in args.passes:
                    case = f"{size}x{size} B{batch} {grid} {dtype} {'forward' if direction == 'forward' else 'forward+backward'}"
                    measurements += common.compare(
                        case,
                        {
                            name: step(call, inputs, size, grid, direction == "both")
                            for name, call in calls.items()
                        },
                        baseline=next(iter(calls)),
                        rounds=args.rounds,
                        items=batch,
                        extra={
                            name: {"MB kept/image": kept_bytes(call, inputs, size, grid) / 1e6 / batch}
                            for name, call in calls.items()
                        }
                        if direction == "both"
                        else None,
                        synchronize=torch.cuda.synchronize if device.type == "cuda" else None,
                    )
    report = common.Report(
        f"Deformable attention core, {args.heads} heads of {args.dim}, {args.groups} groups",
        measurements,
        item="image",
        notes=notes,
        machine=common.describe_machine(str(device)),
    )
    common.emit(report, args)
    return 0


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: no CUDA device here; use cpu")
    return torch.device(name)


def to_dtype(name: str) -> torch.dtype:
    """The dtype that a recipe calls so."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def straightforward() -> ModuleType | None:
    """``benchmarks/straightforward.py`` of the source tree that this package runs from, if it does."""
    import importlib.util

    import dattrain

    path = Path(dattrain.__file__).parents[1] / "benchmarks" / "straightforward.py"
    spec = importlib.util.spec_from_file_location("dattrain_straightforward", path)
    if not path.is_file() or spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw(
    size: int, batch: int, heads: int, groups: int, dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """q, k, v, positions (the grid moved by up to a pixel), table: leaves that require gradients."""
    import torch

    generator = torch.Generator().manual_seed(0)
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    points = (
        torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
        .view(1, 1, -1, 2)
        .repeat(batch, groups, 1, 1)
    )
    points += (torch.rand(points.shape, generator=generator) * 2 - 1) * 2 / size
    matrices = [torch.randn(batch, heads, size * size, dim, generator=generator).to(dtype) for _ in range(3)]
    table = torch.randn(heads, 2 * size - 1, 2 * size - 1, generator=generator) * 0.02
    return tuple(x.to(device).requires_grad_() for x in (*matrices, points, table))


def with_backend(function: Callable[..., torch.Tensor], backend: str) -> Callable[..., torch.Tensor]:
    """``function`` with that backend."""
    import functools

    return functools.partial(function, backend=backend)


def step(
    call: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], size: int, grid: str, backward: bool
) -> Callable[[], Any]:
    """One turn: forward without gradients, or forward and all gradients."""
    import torch

    cotangent = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(inputs[0])

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
    import torch

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


def try_compile(
    function: Callable[..., torch.Tensor], notes: list[str], warm: tuple[tuple[torch.Tensor, ...], int, str]
) -> Callable[..., torch.Tensor] | None:
    """Compiled and run once; on failure a line in ``notes`` that says why, and None."""
    import torch

    # Each case is a graph of its own, and torch keeps a few per function: what came after them would run uncompiled.
    torch._dynamo.reset()
    compiled = torch.compile(function, dynamic=False, fullgraph=True)
    inputs, size, grid = warm
    try:
        step(compiled, inputs, size, grid, True)()
    except Exception as error:
        notes.append(f"torch.compile failed, left out: {type(error).__name__}: {str(error).splitlines()[0]}")
        return None
    return compiled
