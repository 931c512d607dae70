"""The Triton kernels: in Triton's interpreter anywhere, on the device where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def test_kernels_equal_the_equations_in_the_interpreter() -> None:
    # A process of its own: triton reads TRITON_INTERPRET when it is imported.
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "run_triton_interpreted.py")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "all equal" in done.stdout, done.stdout + done.stderr


@pytest.mark.full
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_to_machine_code_without_a_gpu(capability: int) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    code = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dattrain.ops import triton_kernels as kernels

half = {"q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v"}
single = {"positions", "table", "lse", "delta", "grad_positions", "grad_table", "grad_logits_out", "grad_logits", "partial"}
scalars = {"origin_y", "origin_x", "slope_y", "slope_x", "step_y", "step_x", "scale"}

def compile(kernel, **constants):
    kind = lambda name: (
        "constexpr" if name in constants else "*bf16" if name in half else "*fp32" if name in single
        else "fp32" if name in scalars else "i32"
    )
    source = ASTSource(kernel, {name: kind(name) for name in kernel.arg_names}, constants)
    done = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_stages": 2})
    assert done.asm["cubin"] and done.metadata.shared <= 99 * 1024, (kernel, done.metadata.shared)

common = dict(DIM=32, PADDED=32, BLOCK_Q=64, BLOCK_K=64, HAS_TABLE=True, WHOLE=False, PRECISION="ieee")
compile(kernels._forward_kernel, **common)
compile(kernels._query_gradient_kernel, **common)
compile(kernels._key_gradient_kernel, DETERMINISTIC=False, **common)
compile(kernels._key_gradient_kernel, DETERMINISTIC=True, **{**common, "WHOLE": True})
compile(kernels._delta_kernel, DIM=32, PADDED=32, BLOCK_Q=64)
compile(kernels._table_gradient_kernel, TILE=32, BLOCK_Y=32, BLOCK_X=32, PRECISION="tf32x3")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(capability)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_kernels_equal_the_equations_on_the_device() -> None:
    from attention_cases import Case
    from test_attention import NAMES, run

    for grid in ("center", "corner"):
        for dtype, bound in ((torch.float32, 5e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
            case = Case(
                batch=2, heads=4, groups=2, height=14, width=14, keys=196, table=(27, 27), dim=32, grid=grid
            )
            inputs = [x.detach().cuda().requires_grad_() for x in case.inputs(dtype)]
            exact = [x.detach().double().requires_grad_() for x in inputs]
            generator = torch.Generator().manual_seed(1)
            cotangent = torch.randn(2, 4, 196, 32, generator=generator, dtype=torch.float64).cuda()
            expected, out = run(case, exact, "reference", cotangent), run(case, inputs, "triton", cotangent)
            for name, a, b in zip(("out", *NAMES), (out[0], *out[1]), (expected[0], *expected[1])):
                assert ((a.double() - b).abs().max() / b.abs().max()).item() < bound, (grid, dtype, name)
