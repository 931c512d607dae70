"""One forward and backward of the core, for tools that watch a process: ``python -m benchmarks.gpu.call SIDE HEADS GROUPS B DEVICE``.

What comes before it (compiling, allocating) lies outside of the profiler's range.
"""

from __future__ import annotations

import sys

import torch

from dattrain import ops
from dattrain.bench import attention


def main(side: int, heads: int, groups: int, batch: int, device: str) -> None:
    """bf16, both grids where it is small, the first alone where it is watched for its speed."""
    where = torch.device(device)
    inputs = attention.draw(side, batch, heads, groups, 32, torch.bfloat16, where)
    for grid in ("center", "corner") if side < 14 else ("center",):
        both = attention.step(ops.deform_attention, inputs, side, grid, True)
        both()
        if where.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStart()
        both()
        if where.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    side, heads, groups, batch = map(int, sys.argv[1:5])
    main(side, heads, groups, batch, sys.argv[5])
