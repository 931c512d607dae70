"""The choice of a backend on CUDA, with the device's answers made up: there is none here."""

from __future__ import annotations

import logging
from contextlib import contextmanager, nullcontext

import pytest
import torch

from dattrain.errors import UserError
from dattrain.ops import backends, deform_attention, dispatch, triton_probe, use_backend
from dattrain.ops.deformable_attention import backend_triton

NO_COMPILER = "Failed to find C compiler."


@pytest.fixture
def devices(monkeypatch):
    """Two devices that Triton is for; returns what was asked of them."""
    asked = []

    def capability(index):
        asked.append(index)
        return (9, 0)

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"device {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    kept = (dispatch._device_status, dispatch._say_once)
    for function in kept:
        function.cache_clear()
    yield asked
    for function in kept:
        function.cache_clear()


def inputs(count=1):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 8, generator=generator, requires_grad=True) for n in (4, 3, 3))
    positions = torch.rand(1, 1, 3, 2, generator=generator, requires_grad=True)
    table = torch.randn(2, 3, 3, generator=generator, requires_grad=True)
    return [q, k, v, positions, table]


def run(backend):
    given = inputs()
    out, lse = torch.ops.dattrain.deform_attention(*given, 2, 2, "center", 0.5, backend)
    return out, lse, torch.autograd.grad(out.square().sum(), given)


def test_a_device_is_asked_once(devices, monkeypatch):
    for _ in range(3):
        assert dispatch._triton_status(0) == (True, "device 0; the default on NVIDIA")
    assert dispatch._triton_status(1)[0]
    assert devices == [0, 1]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreter" in dispatch._triton_status(0)[1]


def test_torch_compile_takes_the_answer_as_it_is(recwarn):
    def chosen(x):
        return x + 1 if dispatch._triton_status(0)[0] else x - 1

    expected = chosen(torch.ones(2))
    assert torch.equal(torch.compile(chosen, backend="eager", fullgraph=True)(torch.ones(2)), expected)
    # Traced into, the device would be asked again, and a warning of the cache printed.
    assert not [w for w in recwarn if "lru_cache" in str(w.message)]


def test_where_triton_cannot_compile_the_operator_runs_as_torch_and_says_so_once(
    devices, monkeypatch, caplog
):
    monkeypatch.setattr(dispatch, "_failure", lambda device: NO_COMPILER)
    plain, _, plain_grads = run("torch")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            out, lse, grads = run("triton")
            assert torch.equal(out, plain)
            assert all(torch.equal(a, b) for a, b in zip(grads, plain_grads))
            assert lse.shape == (1, 2, 4)  # what fake tensors were told
    (line,) = caplog.records
    assert NO_COMPILER in line.getMessage() and "Python.h" in line.getMessage()


def test_triton_asked_for_by_name_must_compile(devices, monkeypatch):
    monkeypatch.setattr(dispatch, "_failure", lambda device: NO_COMPILER)
    with pytest.raises(UserError, match=r"use_backend=triton cannot run here.*C compiler.*Python\.h"):
        use_backend("triton").__enter__()
    q, k, v, positions, table = inputs()
    with pytest.raises(UserError, match="backend=triton cannot run here"):
        deform_attention(q, k, v, positions, table, height=2, width=2, backend="triton")
    status = {s.name: s for s in backends()}["triton"]  # what doctor prints
    assert not status.available and NO_COMPILER in status.why


def test_kernels_are_launched_on_the_device_of_their_tensors(devices, monkeypatch):
    entered, inside = [], []

    @contextmanager
    def device_of(tensor):
        entered.append(tensor)
        try:
            yield
        finally:
            entered.pop()

    def launched(*args):
        inside.append(len(entered))
        raise NotImplementedError  # it got here

    monkeypatch.setattr(dispatch, "_failure", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(backend_triton, "forward", launched)
    monkeypatch.setattr(backend_triton, "backward", launched)
    q, k, v, positions, table = (x.detach() for x in inputs())
    with pytest.raises(NotImplementedError):
        torch.ops.dattrain.deform_attention(q, k, v, positions, table, 2, 2, "center", 0.5, "triton")
    with pytest.raises(NotImplementedError):
        torch.ops.dattrain.deform_attention_backward(
            q, q, k, v, positions, table, q, q[..., 0], 2, 2, "center", 0.5, "triton"
        )
    assert inside == [1, 1]


def test_the_probe_says_what_is_wrong(monkeypatch):
    class Kernel:
        def __getitem__(self, grid):
            raise RuntimeError(f"{NO_COMPILER}\nmore lines")

    monkeypatch.setattr(triton_probe, "_store", Kernel())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    triton_probe.failure.cache_clear()
    assert triton_probe.failure(torch.device("cpu")) == NO_COMPILER
    triton_probe.failure.cache_clear()


@pytest.mark.gpu
def test_the_probe_compiles_where_there_is_a_device_and_a_compiler():
    assert triton_probe.failure(torch.device("cuda", torch.cuda.current_device())) is None
