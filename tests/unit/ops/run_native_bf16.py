"""Attention of the native backend in bf16: outputs and gradients into a file, and what the backend says of itself (run by test_tile_unit)."""

from __future__ import annotations

import ctypes
import sys

import torch
from attention_cases import Case
from torch import Tensor

from dattrain import ops
from dattrain.ops.cpp import build

CASES = {
    "14 x 14": Case(batch=1, heads=2, groups=1, height=14, width=14, keys=49, dim=32, table=(27, 27)),
    "no table": Case(batch=1, heads=1, groups=1, height=3, width=7, keys=33, dim=32, table=None),
    "pairs past whole tiles": Case(height=5, width=4, keys=17, dim=40),
    "few pairs": Case(height=1, width=1, keys=1, dim=6),
    "many columns": Case(batch=1, heads=1, groups=1, height=2, width=3, keys=9, dim=100),
}
WINDOWS = {"7 x 7": (49, 32), "4 x 4": (16, 24), "12 x 12": (144, 32)}


def results() -> dict[str, list[Tensor]]:
    """By case: the output, then the gradients."""
    found = {}
    for name, case in CASES.items():
        inputs = case.inputs(torch.bfloat16)
        out = ops.deform_attention(*inputs, **case.keywords, backend="native")
        found[name] = _with_gradients(out, [x for x in inputs if x is not None])
    draw = torch.Generator().manual_seed(0)
    for name, (area, dim) in WINDOWS.items():
        qkv = torch.randn(2, 3, area, 3 * 2 * dim, generator=draw).bfloat16().requires_grad_()
        bias = torch.randn(2, area, area, generator=draw).requires_grad_()
        out = ops.window_attention(qkv, bias, None, 2)
        found[f"windows of {name}"] = _with_gradients(out, [qkv, bias])
    return found


def _with_gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=draw).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


if __name__ == "__main__":
    torch.save(results(), sys.argv[1])
    print(build.status()[1])
    print("products:", ctypes.c_long.in_dll(build.library(), "emulated_products").value)
