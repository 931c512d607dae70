"""The attention kernels compiled for a GPU that is not there, and what their machine code costs: a performance test without a device.

The product's own ``forward`` and ``backward`` run on CPU tensors beside a driver that only names its target, and every launch
compiles instead of running: so these are the specialisations that a device would be given. Read from their machine code
(``nvdisasm`` and ``cuobjdump`` are in Triton's wheel) are registers, stack (spills), shared memory, and the instructions of all
programs of a launch, over the true scores, batch * heads * queries * keys: padding, prologues, leftover keys, everything.
Every branch is counted as taken, and each loop by its trips; of a kernel whose programs do one thing or another, each does its own.
Counted beside are the launches, of ours and of torch, by the operators that forward and backward call.

    python -m benchmarks.kernels --capability 90 --json FILE     # {"14x14": {KERNEL: instructions per score, ..., "sum": n}, ...}
    python -m benchmarks.kernels --capability 80 89 90 100 --head-dim 16 32 64 --dtype bf16 fp16 --check
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from dattrain.ops import dispatch
from dattrain.ops.deformable_attention import backend_triton, torch_op, triton_tiles
from dattrain.ops.dispatch import MAX_TRITON_HEAD_DIM

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Layer(NamedTuple):
    """Shape of one deformable attention, as a model has it in training."""

    batch: int
    heads: int
    groups: int
    keys: int
    table: int
    """The side that a map has whose table this is: 2 * table - 1 entries each way."""

    def scores(self, height: int, width: int) -> int:
        """Pairs of a query and a key."""
        return self.batch * self.heads * height * width * self.keys


LAYERS = {
    "7x7": Layer(128, 24, 6, 49, 7),
    "12x12": Layer(32, 32, 8, 144, 12),
    "14x14": Layer(128, 12, 3, 196, 14),
    "24x24": Layer(32, 16, 4, 576, 24),
    "28x28": Layer(128, 6, 2, 196, 28),
    "56x56": Layer(32, 3, 1, 49, 56),
    "50x80": Layer(2, 12, 3, 4000, 14),
    "32x128": Layer(2, 12, 3, 4096, 14),
    "64x64": Layer(2, 12, 3, 4096, 14),
    "25x40": Layer(2, 24, 6, 1000, 7),
    "100x160": Layer(2, 6, 2, 1000, 28),
    "200x320": Layer(2, 3, 1, 1000, 56),
}
"""By the map, rows x columns: DAT-T's at 224 (7, 14), DAT-B's at 384 (12, 24), DAT++'s first stages at 224 (56, 28); then dense prediction's,
whose tables are those of 224 stretched (any other map is taken for DAT-T's third stage): DAT-T's at 800 x 1280 (50x80, 25x40) and at 512 x 2048, DAT++-T's first stages at 800 x 1280 (200x320, 100x160)."""


class Device(NamedTuple):
    """Limits of a compute capability (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability")."""

    shared_block: int
    shared_multiprocessor: int
    threads: int


DEVICES = {
    80: Device(163 * 1024, 164 * 1024, 2048),
    86: Device(99 * 1024, 100 * 1024, 1536),
    89: Device(99 * 1024, 100 * 1024, 1536),
    90: Device(227 * 1024, 228 * 1024, 2048),
    100: Device(227 * 1024, 228 * 1024, 2048),
    120: Device(99 * 1024, 100 * 1024, 1536),
}
REGISTERS = 65536
"""Registers of a multiprocessor."""

LIMITS = {
    "14x14": {
        "prepare_kernel": 3, "forward_kernel": 51, "backward_kernel": 55, "query_gradient_kernel": 6,
        "table_gradient_kernel": 16, "sums_kernel": 1.2, "sum": 132,
    },
    "24x24": {
        "prepare_kernel": 1.2, "forward_kernel": 32.5, "backward_kernel": 44, "query_gradient_kernel": 2.2,
        "table_gradient_kernel": 37, "sums_kernel": 0.4, "sum": 117,
    },
}  # fmt: skip
"""Instructions per score that a kernel may take on 9.0 (bf16, head dim 32), by the map's side; a change that raises one says why."""
LAUNCHES = {"7x7": 8, "12x12": 9, "14x14": 9, "24x24": 8, "28x28": 9, "56x56": 8}
"""Launches of forward and backward together, at most: two, and six of ours (five where no tile of keys is left over) and one of torch."""
BLOCKS = {"forward_kernel": 6, "backward_kernel": 3}
"""Blocks that a multiprocessor must hold, in the cases of ``LIMITS``."""
STACK = {"forward_kernel": 8, "backward_kernel": 192, "table_gradient_kernel": 72}
"""Bytes per thread that may be spilled: the price of limits of registers that made these faster (docs/benchmarks/h100.md)."""


@dataclass(frozen=True)
class Launch:
    """One launch: what it compiled to and what it would cost."""

    kernel: str
    work: int
    """Instructions of all programs, of one thread each."""
    warps: int
    registers: int
    stack: int
    """Bytes per thread: what was spilled."""
    shared: int
    blocks: int
    """Blocks that fit on a multiprocessor."""
    instructions: int
    loop: int
    """Instructions in the loop."""
    trips: int
    products: int
    """Tensor-core instructions."""
    planes: str | None
    """Layout of the loads of planes: numbers per thread x threads of a warp."""
    code: str
    """Which compilation it was: launches with the same one share it."""

    def per_score(self, scores: int) -> float:
        """Instructions of all threads, per score."""
        return self.work * self.warps * 32 / scores


def launches(
    capability: int, size: tuple[int, int], layer: Layer, dtype: torch.dtype, dim: int
) -> tuple[list[Launch], list[str]]:
    """What forward and backward of a layer launch on a device of that compute capability, and torch's operators that launch something.

    Raises:
        triton.runtime.errors.OutOfResources: never; too much shared memory is seen in ``Launch.shared``.
    """
    batch, heads, groups, keys, side = layer
    height, width = size

    def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    tokens, kv = (
        drawn(batch, height * width, heads * dim, dtype=dtype),
        drawn(batch, keys, 2 * heads * dim, dtype=dtype),
    )
    positions, table = drawn(batch, groups, keys, 2), drawn(heads, 2 * side - 1, 2 * side - 1)
    grad_out = torch.zeros_like(tokens)
    with _compile_only(capability) as made, TorchLaunches() as torchs, _inside_operators(torchs):
        # As the model has it: views of tokens, and one tensor of keys and values.
        q = tokens.unflatten(2, (heads, dim)).transpose(1, 2)
        k, v = (x.unflatten(2, (heads, dim)).transpose(1, 2) for x in kv.chunk(2, 2))
        settings = height, width, "center", dim**-0.5, "triton"
        out = torch_op.attention(q, k, v, positions, table, *settings)[0].transpose(1, 2).flatten(2)
        torch.autograd.grad(out, [tokens, kv, positions, table], grad_out)
    return [_launch(*one, capability) for one in made], torchs.operators


class TorchLaunches(TorchDispatchMode):
    """Within, torch's operators that are neither views nor new memory are listed: on a device each is a launch or more."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operator(*args, **(kwargs or {}))
        view = any(given.alias_info and not given.alias_info.is_write for given in operator._schema.returns)
        name = operator._schema.name.removeprefix("aten::")
        if not view and not name.startswith(("empty", "new_empty", "dattrain::")):
            self.operators.append(name)
        return made


@contextmanager
def _inside_operators(counted: TorchLaunches) -> Iterator[None]:
    """Modes see our operators from outside only."""
    forward, backward = backend_triton.forward, backend_triton.backward

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            with counted:
                return function(*arguments)

        return called

    backend_triton.forward, backend_triton.backward = counting(forward), counting(backward)
    try:
        yield
    finally:
        backend_triton.forward, backend_triton.backward = forward, backward


class _NamedDevice:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@contextmanager
def _compile_only(capability: int) -> Iterator[list[tuple[str, tuple[int, ...], dict[str, Any], Any]]]:
    """Within, a launch compiles and is listed: kernel, grid, arguments by name, what was compiled."""
    made: list[tuple[str, tuple[int, ...], dict[str, Any], Any]] = []
    run, asked, compiles = JITFunction.run, triton_tiles.capability, dispatch.compiles

    def compile_instead(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        made.append((self.__name__, tuple(grid), {**dict(zip(self.arg_names, args)), **kwargs}, compiled))
        return compiled

    # Not taken back: beside no GPU there is no driver to go back to, and this process only compiles.
    driver.set_active(_NamedDevice(capability))
    JITFunction.run = compile_instead
    triton_tiles.capability = lambda device: capability // 10
    dispatch.compiles = lambda device: True
    try:
        yield made
    finally:
        JITFunction.run, triton_tiles.capability, dispatch.compiles = run, asked, compiles


def _trips(kernel: str, a: dict[str, Any]) -> int:
    """Turns of a kernel's loop."""
    match kernel:
        case "forward_kernel" | "query_gradient_kernel":
            return int(a["n_keys"] // a["BLOCK_K"])
        case "backward_kernel":
            return int(a["places"]) // int(a["R"] * a["C"] * a["S"])
        case "table_gradient_kernel":
            return int(a["per_program"])
        case "sums_kernel":
            return math.ceil(int(a["parts"]) / int(a["BLOCK_PARTS"]))
    return 0


def _programs(kernel: str, grid: tuple[int, ...], a: dict[str, Any]) -> list[int]:
    """Programs of a launch, by which of the kernel's alternatives they do."""
    some = {
        "prepare_kernel": ("starts_programs", "planes_programs"),
        "sums_kernel": ("table_programs",),
    }.get(kernel, ())
    alternatives = [int(a[name]) for name in some]
    rest = math.prod(grid) - sum(alternatives)
    return [*alternatives, rest] if rest or not alternatives else alternatives


def _launch(
    kernel: str, grid: tuple[int, ...], arguments: dict[str, Any], compiled: Any, capability: int
) -> Launch:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", f.name)
        code = _run(triton.knobs.nvidia.nvdisasm.path, "-c", f.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    registers, stack = map(int, found.groups())
    programs, trips = _programs(kernel, grid, arguments), _trips(kernel, arguments)
    parts = [_instructions(part) for part in _alternatives(code, len(programs))]
    instructions = sum((names for names, _ in parts), Counter[str]())
    work = sum(n * (names.total() + loop * (trips - 1)) for n, (names, loop) in zip(programs, parts))
    warps, device = compiled.metadata.num_warps, DEVICES[capability]
    blocks = min(
        REGISTERS // (-(-registers // 8) * 8 * warps * 32),
        device.shared_multiprocessor // (compiled.metadata.shared + 1024),
        device.threads // (warps * 32),
        32,
    )
    return Launch(
        kernel, work, warps, registers, stack, compiled.metadata.shared, blocks, instructions.total(),
        max(loop for _, loop in parts), trips, sum(n for name, n in instructions.items() if re.match(r"HMMA|HGMMA|UTC.*MMA", name)),
        _planes_layout(compiled.asm["ttgir"]), compiled.hash,
    )  # fmt: skip


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _alternatives(code: str, n: int) -> list[str]:
    """Machine code of each of n things that a program does one of: from one exit, which no predicate guards, to the next."""
    if n == 1:
        return [code]
    parts = re.split(r"(?<=\*/ {19}EXIT) *;", re.sub(r"\*/ +EXIT", "*/" + " " * 19 + "EXIT", code))
    if len(parts) != n + 1:
        raise ValueError(f"{len(parts) - 1} exits where {n} were expected")
    return [part + ";" for part in parts[:n]]


def _instructions(code: str) -> tuple[Counter[str], int]:
    """Instructions by name, and how many lie in the loop: between the furthest backward branch and where it leads."""
    names: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in code.splitlines():
        if found := re.match(r"\s*(\.L_x_\d+):", line):
            labels[found[1]] = len(names)
        if found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", line):
            if found[1].startswith("BRA") and (target := re.search(r"\((\.L_x_\d+)\)", found[2])):
                branches.append((len(names), target[1]))
            names.append(found[1].split(".")[0])
    back = [at - labels[target] + 1 for at, target in branches if labels.get(target, len(names)) < at]
    return Counter(name for name in names if name != "NOP"), max(back, default=0)


def _planes_layout(ttgir: str) -> str | None:
    """How a warp shares out a load of planes, tile by tile of keys x queries: the one long load of 8-byte numbers."""
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{(.*?)\}>", ttgir, re.MULTILINE))
    found = re.search(r"tt\.load [^\n]*tensor<[\dx]+x!tt\.ptr<i64>, (#\w+)>", ttgir)
    shared = found and re.search(
        r"sizePerThread = (\[.*?\]), threadsPerWarp = (\[.*?\])", layouts.get(found[1], "")
    )
    return f"{shared[1]} x {shared[2]}" if shared else None


def problems(
    name: str,
    capability: int,
    dtype: str,
    dim: int,
    found: Sequence[Launch],
    operators: Sequence[str],
    scores: int,
) -> list[str]:
    """What a reader must know before this is run: spills, too much shared memory, no tensor cores, scattered loads, a limit passed."""
    where = f"{name}, {capability / 10}, {dtype}, head dim {dim}"
    half = dtype != "fp32"
    wrong = []
    for one in found:
        limit = DEVICES[capability].shared_block
        if one.shared > limit:
            wrong.append(f"{one.kernel} takes {one.shared} B of shared memory, over {limit}")
        if half and dim <= 64 and one.stack > STACK.get(one.kernel, 0):
            wrong.append(f"{one.kernel} spills {one.stack} B per thread")
        if half and one.trips and one.kernel != "sums_kernel" and not one.products:
            wrong.append(f"{one.kernel} uses no tensor cores")
        if one.kernel in BLOCKS and one.planes != "[1] x [32]":
            wrong.append(
                f"{one.kernel} loads planes as {one.planes}, not lane by lane along queries ([1] x [32])"
            )
    if capability == 90 and dtype == "bf16" and dim == 32 and name in LIMITS:
        for kernel, n in totals(found, scores).items():
            if n > LIMITS[name].get(kernel, 0):
                wrong.append(
                    f"{kernel} takes {n:.1f} instructions per score, over {LIMITS[name].get(kernel, 0)}"
                )
        wrong += [
            f"{one.kernel}: {one.blocks} blocks per multiprocessor, under {BLOCKS[one.kernel]}"
            for one in found
            if one.blocks < BLOCKS.get(one.kernel, 0)
        ]
    if len(found) + len(operators) > LAUNCHES.get(name, math.inf):
        wrong.append(f"{len(found)} launches of ours and {len(operators)} of torch, over {LAUNCHES[name]}")
    return [f"{where}: {what}" for what in wrong]


def totals(found: Sequence[Launch], scores: int) -> dict[str, float]:
    """Instructions per score by kernel (launches of one kernel together), and their ``sum``."""
    sums: dict[str, float] = {}
    for one in found:
        sums[one.kernel] = sums.get(one.kernel, 0.0) + one.per_score(scores)
    return {**sums, "sum": sum(sums.values())}


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table per case; 1 with ``--check`` where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--capability",
        nargs="+",
        type=int,
        default=[90],
        choices=DEVICES,
        help="10 times the compute capability",
    )
    parser.add_argument(
        "--map",
        nargs="+",
        default=["14x14", "24x24"],
        help=f"ROWSxCOLUMNS of queries: {', '.join(LAYERS)}, or any other",
    )
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=DTYPES)
    parser.add_argument("--head-dim", nargs="+", type=int, default=[32])
    parser.add_argument(
        "--json", type=Path, help="instructions per score of one capability, dtype and head dim, by map"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="fail on spills (half precision, head dims up to 64), too much shared memory, no tensor cores, "
        "scattered loads, or more instructions than agreed",
    )
    args = parser.parse_args(argv)
    maps = {name: _map(name) for name in args.map if re.fullmatch(r"[1-9]\d*x[1-9]\d*", name)}
    if unknown := [name for name in args.map if name not in maps]:
        parser.error(f"--map {unknown[0]}: a map is ROWSxCOLUMNS")
    for dim in args.head_dim:
        if not 0 < dim <= MAX_TRITON_HEAD_DIM:
            parser.error(f"--head-dim {dim}: the kernels take 1 to {MAX_TRITON_HEAD_DIM}")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.parent}")
    if args.json and max(map(len, (args.capability, args.dtype, args.head_dim))) > 1:
        parser.error("--json holds one capability, dtype and head dim")
    print(f"Triton {triton.__version__}, torch {torch.__version__}; nothing ran on a device")
    result, wrong, codes = {}, [], set()
    for capability in args.capability:
        for dtype in args.dtype:
            for dim in args.head_dim:
                for name in args.map:
                    layer, size = maps[name]
                    scores = layer.scores(*size)
                    found, operators = launches(capability, size, layer, DTYPES[dtype], dim)
                    title = f"{name}, compute capability {capability / 10}, {dtype}, head dim {dim}"
                    print(_table(title, found, operators, scores), flush=True)
                    result[name] = {kernel: round(n, 2) for kernel, n in totals(found, scores).items()}
                    codes |= {one.code for one in found}
                    wrong += problems(name, capability, dtype, dim, found, operators, scores)
    print(f"\n{len(codes)} kernels were compiled")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.check and wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    return 0


def _map(name: str) -> tuple[Layer, tuple[int, int]]:
    height, width = map(int, name.split("x"))
    return LAYERS.get(name, Layer(2, 12, 3, height * width, 14)), (height, width)


def _table(title: str, found: Sequence[Launch], operators: Sequence[str], scores: int) -> str:
    rows = [
        f"\n{title}\n",
        "| kernel | warps | registers | stack, B | shared, B | blocks/SM | instructions, in the loop | loads of planes | instructions per score |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        rows.append(
            f"| {one.kernel} | {one.warps} | {one.registers} | {one.stack} | {one.shared} | {one.blocks} | "
            f"{one.instructions}, {one.loop} | {one.planes or ''} | {one.per_score(scores):.2f} |"
        )
    total = f"| **sum** | | | | | | | | **{totals(found, scores)['sum']:.1f}** |"
    return "\n".join(
        [*rows, total, f"\n{len(found)} launches of ours, {len(operators)} of torch {' '.join(operators)}"]
    )


if __name__ == "__main__":
    sys.exit(main())
