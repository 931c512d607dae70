"""Which implementation of the attention core runs: the automatic choice, and how to override it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from dattrain.errors import UserError
from dattrain.ops import native

Backend = Literal["reference", "torch", "native", "triton"]
ENVIRONMENT_VARIABLE = "DATTRAIN_ATTENTION"
MAX_TRITON_HEAD_DIM = 128
# The innermost use_backend is last. Not a ContextVar: activation checkpointing runs forwards again in autograd's own
# threads, and must find the same choice there.
_chosen: list[Backend] = []


class BackendStatus(NamedTuple):
    """One line of ``dattrain doctor``: a backend, whether it can run here, and why (not)."""

    name: Backend
    available: bool
    why: str


def backends() -> list[BackendStatus]:
    """Every backend and whether it can run on this machine."""
    return [
        BackendStatus("reference", True, "the equations, every matrix materialised: an oracle for tests"),
        BackendStatus(
            "torch", True, "plain torch on any device; the default where neither of the next two runs"
        ),
        BackendStatus("native", *native.status()),
        BackendStatus("triton", *_triton_status()),
    ]


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Within the block, attention runs with this backend wherever a call names none itself; in every thread.

    Raises:
        UserError: if there is no such backend, or it cannot run here.
    """
    _chosen.append(_checked(name, "use_backend"))
    try:
        yield
    finally:
        _chosen.pop()


def resolve(q: Tensor, asked: str | None, head_dim: int = 0) -> Backend:
    """The backend for an operator on ``q``: the argument, else ``use_backend``, else the environment, else the best.

    ``head_dim`` is that of attention's heads; operators on maps have none.

    On CPU the best is ``native``, whose operator runs as ``torch`` where it could not be compiled.

    Raises:
        UserError: if the backend asked for is unknown, cannot run here, or not for this device, dtype or head dim.
    """
    named, source = (
        (asked, "backend")
        if asked is not None
        else (_chosen[-1], "use_backend")
        if _chosen
        else (os.environ.get(ENVIRONMENT_VARIABLE), ENVIRONMENT_VARIABLE)
    )
    on_gpu = q.device.type == "cuda"
    fits_triton = q.dtype != torch.float64 and head_dim <= MAX_TRITON_HEAD_DIM
    if not named:
        if on_gpu:
            return "triton" if fits_triton and _triton_status()[0] else "torch"
        return "native" if q.device.type in ("cpu", "meta") else "torch"
    chosen = _checked(named, source)
    if chosen == "native" and on_gpu:
        raise UserError(f"{source}=native is for CPU tensors, and these are on {q.device}")
    if chosen == "triton" and not fits_triton:
        raise UserError(
            f"{source}=triton computes in fp32 with head dims up to {MAX_TRITON_HEAD_DIM}, not {q.dtype} with {head_dim}; "
            "use torch"
        )
    return chosen


def _checked(name: str, source: str) -> Backend:
    if name not in get_args(Backend):
        raise UserError(f"{source}={name} is no attention backend; there are {', '.join(get_args(Backend))}")
    # Under torch.compile the question cannot be traced (it may run a compiler); the operator meets the answer.
    if name in ("native", "triton") and not torch.compiler.is_compiling():
        usable, why = native.status() if name == "native" else _triton_status()
        if not usable:
            raise UserError(f"{source}={name} cannot run here: {why}")
    return cast(Backend, name)


def _triton_status() -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "the triton package is not installed"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return True, "Triton's interpreter (TRITON_INTERPRET is set): for tests, very slow"
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    if torch.version.hip is not None:
        return True, "AMD GPU through ROCm's Triton; not tested"
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if capability < (8, 0):
        return False, f"{name} has compute capability {capability[0]}.{capability[1]}; 8.0 or newer is needed"
    return True, f"{name}; the default on NVIDIA"
