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
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from benchmarks.machine_code import DEVICES, Launch, TorchLaunches, compile_only, inside_operators, read
from dattrain.ops.deformable_attention import torch_op
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
"""By the map, rows x columns: DAT-T's at 224 (7, 14), DAT-B's at 384 (12, 24), DAT++'s first stages at 224 (56, 28).

Then dense prediction's, whose tables are those of 224 stretched: DAT-T's at 800 x 1280 (50x80, 25x40) and 512 x 2048 (32x128), a
square one, DAT++-T's first stages at 800 x 1280 (200x320, 100x160). Any other map is taken for DAT-T's third stage."""


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
"""Instructions per score that a kernel may take on 9.0 (bf16, head dim 32), by the map; a change that raises one says why."""
LAUNCHES = {"7x7": 8, "12x12": 9, "14x14": 9, "24x24": 8, "28x28": 9, "56x56": 8}
"""Launches of forward and backward together, at most: two, and six of ours (five where no tile of keys is left over) and one of torch."""
BLOCKS = {"forward_kernel": 6, "backward_kernel": 3}
"""Blocks that a multiprocessor must hold, in the cases of ``LIMITS``."""
STACK = {"forward_kernel": 8, "backward_kernel": 192, "table_gradient_kernel": 72}
"""Bytes per thread that may be spilled: the price of limits of registers that made these faster (docs/benchmarks/h100.md)."""


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
    with compile_only(capability) as made, TorchLaunches() as torchs, inside_operators(torchs):
        # As the model has it: views of tokens, and one tensor of keys and values.
        q = tokens.unflatten(2, (heads, dim)).transpose(1, 2)
        k, v = (x.unflatten(2, (heads, dim)).transpose(1, 2) for x in kv.chunk(2, 2))
        settings = height, width, "center", dim**-0.5, "triton"
        out = torch_op.attention(q, k, v, positions, table, *settings)[0].transpose(1, 2).flatten(2)
        torch.autograd.grad(out, [tokens, kv, positions, table], grad_out)
    return [read(*one, capability) for one in made], torchs.operators


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
    maps = {name: _map(name) for name in args.map if re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}", name)}
    if unknown := [name for name in args.map if name not in maps]:
        parser.error(f"--map {unknown[0]}: a map is ROWSxCOLUMNS, each below 10,000, such as 50x80")
    for dim in args.head_dim:
        if not 0 < dim <= MAX_TRITON_HEAD_DIM:
            parser.error(f"--head-dim {dim}: the kernels take 1 to {MAX_TRITON_HEAD_DIM}")
    if args.json and args.json.is_dir():
        parser.error(f"--json {args.json}: this is a folder; name a file")
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
