"""The attention kernels compiled for a GPU that is not there, and what their machine code costs: a performance test without a device.

The product's own ``forward`` and ``backward`` run on CPU tensors beside a driver that only names its target, and every launch
compiles instead of running: so these are the specialisations that a device would be given. Read from their machine code
(``nvdisasm`` and ``cuobjdump`` are in Triton's wheel) are registers, stack (spills), shared memory, and the instructions of all
programs of a launch, over the true scores, batch * heads * queries * keys: padding, prologues, leftover keys, everything.
Every branch is counted as taken, and each loop by its trips. Not counted: torch's sums over splits and over a group's heads.

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from dattrain.ops.deformable_attention import backend_triton
from dattrain.ops.deformable_attention.coordinates import Geometry, Inputs
from dattrain.ops.dispatch import MAX_TRITON_HEAD_DIM

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Layer(NamedTuple):
    """Shape of one deformable attention, as a model has it in training."""

    batch: int
    heads: int
    groups: int
    keys: int


LAYERS = {
    7: Layer(128, 24, 6, 49),
    12: Layer(32, 32, 8, 144),
    14: Layer(128, 12, 3, 196),
    24: Layer(32, 16, 4, 576),
    28: Layer(128, 6, 2, 196),
    56: Layer(32, 3, 1, 49),
}
"""By the side of the map: DAT-T's at 224 (7, 14), DAT-B's at 384 (12, 24), DAT++'s first stages at 224 (56, 28)."""


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
    14: {
        "starts_kernel": 0.1, "planes_kernel": 0.3, "forward_kernel": 51, "delta_kernel": 2.7, "backward_kernel": 55,
        "query_gradient_kernel": 6, "table_gradient_kernel": 16.6, "sum": 132,
    },
    24: {
        "starts_kernel": 0.1, "planes_kernel": 0.4, "forward_kernel": 32.5, "delta_kernel": 0.7, "backward_kernel": 44,
        "query_gradient_kernel": 2.2, "table_gradient_kernel": 48, "sum": 128,
    },
}  # fmt: skip
"""Instructions per score that a kernel may take on 9.0 (bf16, head dim 32), by the map's side; a change that raises one says why."""
BLOCKS = {"forward_kernel": 6, "backward_kernel": 3}
"""Blocks that a multiprocessor must hold, in the cases of ``LIMITS``."""
STACK = {"forward_kernel": 8, "backward_kernel": 176, "table_gradient_kernel": 40}
"""Bytes per thread that may be spilled: the price of limits of registers that made these faster (docs/benchmarks/h100.md)."""


@dataclass(frozen=True)
class Launch:
    """One launch: what it compiled to and what it would cost."""

    kernel: str
    programs: int
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

    def per_score(self, scores: int) -> float:
        """Instructions of all threads, per score."""
        return (
            (self.loop * self.trips + self.instructions - self.loop)
            * self.warps
            * 32
            * self.programs
            / scores
        )


def launches(capability: int, side: int, layer: Layer, dtype: torch.dtype, dim: int) -> list[Launch]:
    """What forward and backward of a layer launch on a device of that compute capability.

    Raises:
        triton.runtime.errors.OutOfResources: never; too much shared memory is seen in ``Launch.shared``.
    """
    batch, heads, groups, keys = layer
    # As the model makes them: views of tokens. Nothing reads these numbers.
    q = torch.empty(batch, side * side, heads, dim, dtype=dtype).transpose(1, 2)
    k, v = torch.empty(batch, keys, 2, heads, dim, dtype=dtype).permute(2, 0, 3, 1, 4)
    positions = torch.zeros(batch, groups, keys, 2)
    table = torch.zeros(heads, 2 * side - 1, 2 * side - 1)
    with _compile_only(capability) as made:
        inputs, geometry = Inputs(q, k, v, positions, table), Geometry(side, side, "center", dim**-0.5)
        out, lse = backend_triton.forward(inputs, geometry)
        backend_triton.backward(torch.empty_like(q), inputs, out, lse, geometry)
    return [_launch(*one, capability) for one in made]


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
    run, asked = JITFunction.run, backend_triton.capability

    def compile_instead(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        made.append((self.__name__, tuple(grid), {**dict(zip(self.arg_names, args)), **kwargs}, compiled))
        return compiled

    # Not taken back: beside no GPU there is no driver to go back to, and this process only compiles.
    driver.set_active(_NamedDevice(capability))
    JITFunction.run = compile_instead
    backend_triton.capability = lambda device: capability // 10
    try:
        yield made
    finally:
        JITFunction.run, backend_triton.capability = run, asked


def _trips(kernel: str, a: dict[str, Any]) -> int:
    """Turns of a kernel's loop."""
    match kernel:
        case "forward_kernel" | "query_gradient_kernel":
            return int(a["n_keys"] // a["BLOCK_K"])
        case "backward_kernel":
            return int(math.ceil(a["H"] / (a["R"] * a["S"])) * math.ceil(a["W"] / a["C"]))
        case "table_gradient_kernel":
            return int(a["per_program"])
    return 0


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
    instructions, loop = _instructions(code)
    warps, device = compiled.metadata.num_warps, DEVICES[capability]
    blocks = min(
        REGISTERS // (-(-registers // 8) * 8 * warps * 32),
        device.shared_multiprocessor // (compiled.metadata.shared + 1024),
        device.threads // (warps * 32),
        32,
    )
    return Launch(
        kernel, math.prod(grid), warps, registers, stack, compiled.metadata.shared, blocks, sum(instructions.values()), loop,
        _trips(kernel, arguments), sum(n for name, n in instructions.items() if re.match(r"HMMA|HGMMA|UTC.*MMA", name)),
        _planes_layout(compiled.asm["ttgir"]),
    )  # fmt: skip


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


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
    side: int, capability: int, dtype: str, dim: int, found: Sequence[Launch], scores: int
) -> list[str]:
    """What a reader must know before this is run: spills, too much shared memory, no tensor cores, scattered loads, a limit passed."""
    where = f"{side}x{side}, {capability / 10}, {dtype}, head dim {dim}"
    half = dtype != "fp32"
    wrong = []
    for one in found:
        limit = DEVICES[capability].shared_block
        if one.shared > limit:
            wrong.append(f"{one.kernel} takes {one.shared} B of shared memory, over {limit}")
        if half and dim <= 64 and one.stack > STACK.get(one.kernel, 0):
            wrong.append(f"{one.kernel} spills {one.stack} B per thread")
        if half and one.trips and not one.products:
            wrong.append(f"{one.kernel} uses no tensor cores")
        if one.kernel in BLOCKS and one.planes != "[1] x [32]":
            wrong.append(
                f"{one.kernel} loads planes as {one.planes}, not lane by lane along queries ([1] x [32])"
            )
    if capability == 90 and dtype == "bf16" and dim == 32 and side in LIMITS:
        for kernel, n in totals(found, scores).items():
            if n > LIMITS[side].get(kernel, 0):
                wrong.append(
                    f"{kernel} takes {n:.1f} instructions per score, over {LIMITS[side].get(kernel, 0)}"
                )
        wrong += [
            f"{one.kernel}: {one.blocks} blocks per multiprocessor, under {BLOCKS[one.kernel]}"
            for one in found
            if one.blocks < BLOCKS.get(one.kernel, 0)
        ]
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
    parser.add_argument("--side", nargs="+", type=int, default=[14, 24], choices=LAYERS, help="of the map")
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
    for dim in args.head_dim:
        if not 0 < dim <= MAX_TRITON_HEAD_DIM:
            parser.error(f"--head-dim {dim}: the kernels take 1 to {MAX_TRITON_HEAD_DIM}")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.parent}")
    if args.json and max(map(len, (args.capability, args.dtype, args.head_dim))) > 1:
        parser.error("--json holds one capability, dtype and head dim")
    print(f"Triton {triton.__version__}, torch {torch.__version__}; nothing ran on a device")
    result, wrong = {}, []
    for capability in args.capability:
        for dtype in args.dtype:
            for dim in args.head_dim:
                for side in args.side:
                    layer = LAYERS[side]
                    scores = layer.batch * layer.heads * side * side * layer.keys
                    found = launches(capability, side, layer, DTYPES[dtype], dim)
                    print(
                        _table(
                            f"{side}x{side}, compute capability {capability / 10}, {dtype}, head dim {dim}",
                            found,
                            scores,
                        ),
                        flush=True,
                    )
                    result[f"{side}x{side}"] = {
                        name: round(n, 2) for name, n in totals(found, scores).items()
                    }
                    wrong += problems(side, capability, dtype, dim, found, scores)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.check and wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    return 0


def _table(title: str, found: Sequence[Launch], scores: int) -> str:
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
    return "\n".join([*rows, f"| **sum** | | | | | | | | **{totals(found, scores)['sum']:.1f}** |"])


if __name__ == "__main__":
    sys.exit(main())
