"""Run by test_triton.py in a process of its own, with TRITON_INTERPRET=1: kernels on CPU tensors against the equations.

Then sampling's against grid_sample, since the process takes long to start."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import torch
import triton.language as tl
from attention_cases import Case
from torch import Tensor
from triton.runtime import interpreter

from dattrain import ops
from dattrain.ops.deformable_attention import backend_triton, triton_planes, triton_tiles

CASES = {
    "center": Case(batch=1, heads=2, groups=1, keys=3),
    "corner": Case(batch=2, heads=2, groups=2, keys=3, grid="corner"),
    "other table": Case(batch=1, heads=2, groups=1, keys=3, table=(4, 11)),
    "far outside": Case(batch=1, heads=2, groups=1, keys=5, spread=9.0, grid="corner"),
    "no table": Case(batch=1, heads=2, groups=1, table=None),
    "several tiles": Case(batch=1, heads=1, groups=1, height=9, width=8, keys=66, table=(17, 15), dim=20),
    "one by one": Case(batch=1, heads=1, groups=1, height=1, width=1, keys=1, table=(1, 1), dim=3),
    "one row": Case(batch=1, heads=2, groups=1, height=1, width=6, keys=3, table=(1, 11), grid="corner"),
    "empty batch": Case(batch=0),
    "wide heads": Case(batch=1, heads=1, groups=1, height=2, width=2, keys=18, table=(3, 3), dim=100),
    "coarse queries": Case(batch=1, heads=1, groups=1, height=3, width=4, keys=4, table=(16, 12), spread=1.2),
    "two keys in a tile": Case(batch=2, heads=2, groups=1, height=7, width=8, keys=5, table=(13, 15)),
    "stretched over several tiles": Case(
        batch=1, heads=2, groups=1, height=35, width=20, keys=3, table=(7, 7)
    ),
    "tiled table": Case(batch=1, heads=1, groups=1, height=34, width=2, keys=2, table=(67, 3), grid="corner"),
}
HALF = {
    "bf16": (CASES["center"], torch.bfloat16),
    "fp16, several tiles": (
        Case(batch=1, heads=1, groups=1, height=9, width=2, keys=66, table=(17, 3), dim=20),
        torch.float16,
    ),
    "bf16, heads of a group together": (
        Case(batch=1, heads=3, groups=1, height=7, width=7, keys=4, table=(13, 13), dim=32),
        torch.bfloat16,
    ),
}
LONG = {
    "fp16": (CASES["corner"], torch.float16),
    "bf16, far outside": (CASES["far outside"], torch.bfloat16),
    "bf16, tiled table": (
        Case(batch=1, heads=1, groups=1, height=66, width=2, keys=2, table=(131, 3), grid="corner"),
        torch.bfloat16,
    ),
}
"""With ``--full`` alone: other cases have their size, and yet others their dtype."""
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
            # What cancels to nothing (one key: the gradient of q) leaves the last bits of its terms.
            least = 1e-6 if dtype == torch.float32 else 1e-3
            error = (actual.double() - wanted).abs().max() / wanted.abs().max().clamp(min=least)
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


def check_kinks() -> None:
    """At a whole table index the slope is the one to the right, as ``grid_sample`` has it."""
    side = 3
    case = Case(batch=1, heads=1, groups=1, height=side, width=side, keys=side, table=(5, 5), grid="corner")
    q, k, v, _, table = case.inputs(torch.float32)
    exact = (torch.arange(side) * 2 / (side - 1) - 1)[None, None, :, None].expand(1, 1, side, 2)
    for dtype in (torch.float32, torch.float16):
        inputs = [q.detach().to(dtype), k.detach().to(dtype), v.detach().to(dtype)]
        slopes = []
        for backend, kind in (("triton", torch.float32), ("reference", torch.float64)):
            there = exact.to(kind).clone().requires_grad_()
            tensors = inputs if backend == "triton" else [x.double() for x in inputs]
            out = ops.deform_attention(
                *tensors, there, table.detach().to(kind), **case.keywords, backend=backend
            )
            slopes.append(torch.autograd.grad(out.to(kind).square().sum(), there)[0].double())
        error = (slopes[0] - slopes[1]).abs().max() / slopes[1].abs().max()
        assert error < BOUNDS[dtype], (dtype, error.item())


def check_broken_key() -> None:
    """A position that is not finite makes its group's output no number, and reads nothing that is not there."""
    case = Case(batch=2, heads=2, groups=2, height=2, width=2, keys=3, table=(3, 3))
    for dtype, broken, axis in ((torch.float32, float("nan"), 0), (torch.float16, float("inf"), 1)):
        q, k, v, positions, table = (x.detach() for x in case.inputs(dtype))
        there = positions.clone()
        there[1, 0, 2, axis] = broken
        there.requires_grad_()
        out = ops.deform_attention(q, k, v, there, table, **case.keywords, backend="triton")
        assert out[1, 0].isnan().all() and out[0].isfinite().all() and out[1, 1].isfinite().all()
        gradient = torch.autograd.grad(out.float().sum(), there)[0]
        assert gradient[1, 0].isnan().any() and gradient[0].isfinite().all()


def check_pieces() -> None:
    """A scores' gradient that is too large at once: some images, heads or keys at a time, in no more memory than allowed."""
    case = Case(batch=2, heads=2, groups=1, height=2, width=8, keys=66, table=(3, 5), dim=16)
    places = 32  # a patch
    of_a_key, of_a_head = places * 4, 66 * places * 4
    allowed, splits, fill = triton_tiles.SCORES_BYTES, triton_tiles.SPLITS, backend_triton._scores_gradient
    triton_tiles.SPLITS = 2 * case.heads
    taken: list[int] = []

    def noted(grad_logits: Tensor, *others: object) -> None:
        taken.append(grad_logits.untyped_storage().nbytes())
        fill(grad_logits, *others)

    backend_triton._scores_gradient = noted
    try:
        for bytes_, most, pieces in (
            (3 * of_a_head, 2 * of_a_head, 2),  # an image
            (of_a_head, of_a_head, 4),
            (1, 64 * of_a_key, 8),  # a tile of keys, and what is left
        ):
            triton_tiles.SCORES_BYTES = bytes_
            taken.clear()
            check(f"{bytes_} bytes", case, torch.float32)
            assert set(taken) == {most} and len(taken) == pieces, (bytes_, taken)
        check("keys in pieces", replace(case, batch=1, heads=1, groups=1), torch.float16)
    finally:
        triton_tiles.SCORES_BYTES, triton_tiles.SPLITS, backend_triton._scores_gradient = (
            allowed,
            splits,
            fill,
        )


def main(full: bool) -> None:
    """All cases in fp32, some in half precision; strides; a batch in parts; kinks; positions that are no numbers."""
    multiply_bf16_as_numbers()
    # The interpreter takes as long for a program of few cells as for one of many.
    triton_planes.BLOCK = 2048
    for name, case in CASES.items():
        check(name, case, torch.float32)
    for name, (case, dtype) in (HALF | (LONG if full else {})).items():
        check(name, case, dtype)
    # A head dim that needs no padding, which would lay the inputs out anew.
    check("strided", replace(CASES["center"], dim=16), torch.float32, strided=True)
    check_pieces()
    check_kinks()
    check_broken_key()


if __name__ == "__main__":
    main(full="--full" in sys.argv)
    print("attention: all equal", flush=True)
    import run_sampling_interpreted

    run_sampling_interpreted.main()
    print("sampling: all equal", flush=True)
