"""Run by test_triton.py in a process of its own, with TRITON_INTERPRET=1: kernels on CPU tensors against the equations."""

from __future__ import annotations

import sys

import numpy as np
import torch
import triton.language as tl
from attention_cases import Case
from triton.runtime import interpreter

from dattrain import ops

CASES = {
    "center": Case(batch=1, heads=2, groups=1),
    "corner": Case(batch=2, heads=2, groups=2, grid="corner"),
    "other table": Case(batch=1, heads=2, groups=1, table=(4, 11)),
    "far outside": Case(batch=1, heads=2, groups=1, spread=9.0, grid="corner"),
    "no table": Case(batch=1, heads=2, groups=1, table=None),
    "several tiles": Case(batch=1, heads=1, groups=1, height=9, width=8, keys=70, table=(17, 15), dim=20),
    "one by one": Case(batch=1, heads=1, groups=1, height=1, width=1, keys=1, table=(1, 1), dim=3),
    "one row": Case(batch=1, heads=2, groups=1, height=1, width=6, keys=5, table=(1, 11), grid="corner"),
    "empty batch": Case(batch=0),
    "wide heads": Case(batch=1, heads=1, groups=1, height=2, width=2, keys=40, table=(3, 3), dim=100),
}
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DEVICE_BOUNDS = {**BOUNDS, torch.float32: 5e-5}
"""On a GPU, whose sums have another order and whose exponentials are approximate."""


def check(name: str, case: Case, dtype: torch.dtype, strided: bool = False, device: str = "cpu") -> None:
    """Raise AssertionError unless output and gradients are within the dtype's bound of the fp64 equations."""
    inputs = [None if x is None else x.detach().to(device).requires_grad_() for x in case.inputs(dtype)]
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    if strided:
        inputs = [
            None if x is None else x.detach().transpose(1, -1).contiguous().transpose(1, -1).requires_grad_()
            for x in inputs
        ]
    expected = ops.deform_attention(*exact, **case.keywords, backend="reference")
    out = ops.deform_attention(*inputs, **case.keywords, backend="triton")
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(expected.shape, generator=generator, dtype=torch.float64).to(device)
    pairs = [
        (out, expected),
        *zip(
            torch.autograd.grad(
                out, [x for x in inputs if x is not None], cotangent.to(dtype), allow_unused=True
            ),
            torch.autograd.grad(expected, [x for x in exact if x is not None], cotangent, allow_unused=True),
        ),
    ]
    for index, (actual, wanted) in enumerate(pairs):
        if wanted is None:
            assert not actual.any(), (name, index)
        elif wanted.numel():
            error = (actual.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)
            bound = (BOUNDS if device == "cpu" else DEVICE_BOUNDS)[dtype]
            assert error.item() < bound, (name, dtype, index, error.item())


def multiply_bf16_as_numbers() -> None:
    """Triton 3.8's interpreter keeps bf16 as its bits, and multiplies matrices of those bits as integers."""
    plain = interpreter.InterpreterBuilder.create_dot

    def widened(x: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: plain(
        self, widened(a), widened(b), *rest
    )


def main() -> None:
    """All cases in fp32; one in bf16 and fp16; strides; the deterministic table gradient."""
    multiply_bf16_as_numbers()
    for name, case in CASES.items():
        check(name, case, torch.float32)
    check("bf16", CASES["center"], torch.bfloat16)
    check("fp16", CASES["corner"], torch.float16)
    check("strided", CASES["center"], torch.float32, strided=True)
    torch.use_deterministic_algorithms(True)
    for name in ("center", "corner", "other table", "far outside", "several tiles", "one row"):
        check(f"deterministic {name}", CASES[name], torch.float32)
    print("all equal")


if __name__ == "__main__":
    sys.exit(main())
