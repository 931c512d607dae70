"""Sampling where the native kernels are not: Triton's, the CPU without a compiler, CUDA without Triton."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from sampling_cases import BOUNDS, CASES, Case, exact, relative_error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dattrain import ops
from dattrain.models.deformable import Conventions, DeformableAttention
from dattrain.ops import dispatch, sampling
from dattrain.ops.cpp import build

COMPILED = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from dattrain.ops import triton_sampling

class Driver:
    def __init__(self, capability): self.capability = capability
    def get_current_target(self): return GPUTarget("cuda", self.capability, 32)
    def get_current_device(self): return self.capability
    def get_current_stream(self, device=None): return 0

made, run = [], JITFunction.run
JITFunction.run = lambda self, *args, grid, warmup, **kw: made.append(run(self, *args, grid=grid, warmup=True, **kw))
for capability in (80, 90):
    driver.set_active(Driver(capability))
    for dtype in (torch.bfloat16, torch.float32):
        x, positions, grad = torch.zeros(2, 14, 14, 384, dtype=dtype), torch.zeros(2, 3, 196, 2), torch.zeros(2, 196, 384, dtype=dtype)
        triton_sampling.sample(x, positions)
        triton_sampling.sample_backward(grad, x, positions)
assert len(made) == 12 and all(kernel.asm["cubin"] and kernel.metadata.shared <= 48 * 1024 for kernel in made)
print("compiled")
"""


def results(function, x: Tensor, positions: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients of x and positions."""
    leaves = x.detach().requires_grad_(), positions.detach().requires_grad_()
    out = function(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, cotangent))


def test_kernels_compile_to_machine_code_as_they_are_launched() -> None:
    # In a process of its own: triton reads TRITON_INTERPRET when it is imported, and a named driver stays.
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "compiled" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["several tiles", "far outside", "one row", "empty batch"])
def test_the_operator_has_its_gradients_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(build, "status", lambda: (False, "no C++ compiler"))
    monkeypatch.setattr(build, "library", None)
    inputs = CASES[name].inputs(dtype)
    for a, b in zip(results(ops.sample, *inputs), exact(*inputs)):
        assert a.shape == b.shape and relative_error(a, b) < BOUNDS[dtype]


@pytest.mark.parametrize("name", CASES)
def test_what_cuda_runs_without_triton_is_grid_sample(name: str) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        inputs = CASES[name].inputs(dtype)
        for a, b in zip(results(sampling.gather, *inputs), exact(*inputs)):
            assert a.shape == b.shape and relative_error(a, b) < BOUNDS[dtype]
    positions = torch.tensor([float("nan"), 0.0, 1e30, 0.0]).view(1, 1, 2, 2)
    assert sampling.gather(torch.ones(1, 3, 3, 2), positions).isnan().any(-1).tolist() == [[True, False]]


class Seen(TorchDispatchMode):
    """Names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("triton", "backend"), [(True, None), (True, "triton"), (False, None), (False, "reference")]
)
def test_a_deformable_block_on_cuda_never_samples_with_cudnn(
    monkeypatch: pytest.MonkeyPatch, triton: bool, backend: dispatch.Backend | None
) -> None:
    # cudnn_grid_sampler has no deterministic gradient and does not raise under use_deterministic_algorithms.
    monkeypatch.setattr(dispatch, "_triton_status", lambda *_: (triton, ""))
    monkeypatch.setattr(dispatch, "_failure", lambda device: None)
    if backend is not None:
        monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, backend)
    block = DeformableAttention(160, 5, 1, (6, 6), 3, conventions=Conventions())
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, Seen() as seen:
        parameters = {name: fake.from_tensor(p.detach()).to("cuda") for name, p in block.named_parameters()}
        torch.func.functional_call(block, parameters, torch.empty(2, 6, 6, 160, device="cuda"))
    assert not any("cudnn" in name for name in seen.names), seen.names
    if backend != "reference":
        assert not any("grid_sampler" in name for name in seen.names)
        assert ("dattrain::sample" in seen.names) == triton


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "case", [*CASES.values(), Case(8, 3, 14, 14, 128, 196), Case(2, 1, 56, 56, 96, 49)], ids=str
)
def test_sampling_on_the_device_equals_grid_sample_and_itself(case: Case, dtype: torch.dtype) -> None:
    inputs = [t.cuda() for t in case.inputs(dtype)]
    torch.use_deterministic_algorithms(True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = {f: [results(f, *inputs) for _ in range(2)] for f in (ops.sample, sampling.gather)}
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    for first, second in found.values():
        for a, b, wanted in zip(first, second, exact(*inputs)):
            assert torch.equal(a, b) and relative_error(a, wanted) < BOUNDS[dtype]
