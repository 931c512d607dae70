"""Called by run_triton_interpreted.py under TRITON_INTERPRET=1: sampling's kernels on CPU tensors against grid_sample."""

from __future__ import annotations

import torch
from run_triton_interpreted import multiply_bf16_as_numbers
from sampling_cases import BOUNDS, CASES, Case, exact, relative_error

from dattrain import ops


def check(name: str, case: Case, dtype: torch.dtype, strided: bool = False) -> None:
    """Raise AssertionError unless output and gradients are within the dtype's bound of grid_sample in fp64."""
    x, positions, cotangent = case.inputs(dtype)
    if strided:
        x, cotangent = (t.transpose(1, -1).contiguous().transpose(1, -1) for t in (x, cotangent))
    leaves = x.requires_grad_(), positions.requires_grad_()
    out = ops.sample(*leaves)
    found = (out, *torch.autograd.grad(out, leaves, cotangent))
    assert out.dtype == found[1].dtype == dtype and found[2].dtype == torch.float32
    for index, (a, b) in enumerate(zip(found, exact(x, positions, cotangent))):
        assert a.shape == b.shape and relative_error(a, b) < BOUNDS[dtype], (name, dtype, index)


def check_positions_that_are_no_place() -> None:
    """Infinitely far away is outside; what is no number is not hidden, and reads nothing beyond the map."""
    nan, inf = float("nan"), float("inf")
    x = torch.randn(1, 3, 4, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    places = [
        [0.1, 0.2],
        [nan, 0.0],
        [0.0, nan],
        [inf, 0.0],
        [0.0, -inf],
        [1e30, 1e30],
        [nan, 9.0],
        [-1e9, 0.0],
    ]
    positions = torch.tensor(places).view(1, 1, -1, 2).requires_grad_()
    results = []
    for backend in ("triton", "native"):
        with ops.use_backend(backend):
            out = ops.sample(x, positions)
        finite = out.isfinite().all(-1)
        assert finite.tolist() == [[True, False, False, True, True, True, True, True]], backend
        assert not out[0, 3:].any(), backend
        grad_x, grad_positions = torch.autograd.grad(out, (x, positions), torch.ones_like(out))
        assert not grad_x.isfinite().all(), backend
        results.append((out, grad_positions))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, equal_nan=True)


def main() -> None:
    """All cases in fp32, some in fp16 and bf16, other strides; uninitialised memory is filled with what is no number."""
    multiply_bf16_as_numbers()
    torch.use_deterministic_algorithms(True)
    with ops.use_backend("triton"):
        for name, case in CASES.items():
            check(name, case, torch.float32)
        check("strided", CASES["odd channels"], torch.float32, strided=True)
        check("fp16", CASES["several tiles"], torch.float16)
        check("bf16", CASES["odd channels"], torch.bfloat16)
    check_positions_that_are_no_place()
