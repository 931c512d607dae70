"""Triton kernels compiled for a device that is not there, and what their machine code says (``kernels`` counts by it)."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from dattrain.ops import dispatch
from dattrain.ops.deformable_attention import backend_triton, triton_tiles


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
def inside_operators(counted: TorchLaunches) -> Iterator[None]:
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
def compile_only(capability: int) -> Iterator[list[tuple[str, tuple[int, ...], dict[str, Any], Any]]]:
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


def read(
    kernel: str, grid: tuple[int, ...], arguments: dict[str, Any], compiled: Any, capability: int
) -> Launch:
    """What a launch that ``compile_only`` listed was compiled to."""
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
