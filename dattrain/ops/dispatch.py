"""Which implementation of the attention core runs: the automatic choice, and how to override it."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from dattrain.errors import UserError
from dattrain.ops import transforms
from dattrain.ops.cpp import build

Backend = Literal["reference", "torch", "native", "triton"]
ENVIRONMENT_VARIABLE = "DATTRAIN_ATTENTION"
MAX_TRITON_HEAD_DIM = 128
# The innermost use_backend is last. Not a ContextVar: activation checkpointing runs forwards again in autograd's own
# threads, and must find the same choice there.
_chosen: list[Backend] = []

log = logging.getLogger(__name__)


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
        BackendStatus("native", *build.status()),
        BackendStatus("triton", *_triton_usable()),
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

    On CPU the best is ``native`` where it compiles, on CUDA ``triton``, whose operators run as ``torch`` where it does not.
    Under derivatives that operators do not have (``transforms``) it is ``reference``, whatever was asked for; and under
    ``torch.jit.trace``, which would keep the map's size as a number and run any other with it.

    Raises:
        UserError: if the backend asked for is unknown, cannot run here, or not for this device, dtype or head dim.
    """
    if transforms.under_way() or transforms.tracing():
        return "reference"
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
            return "triton" if fits_triton and _triton_status(q.device.index)[0] else "torch"
        # On the meta device, where nothing is computed, no compiler is asked.
        native_runs = q.is_meta or (q.device.type == "cpu" and _native_usable())
        return "native" if native_runs else "torch"
    chosen = _checked(named, source, q.device.index if on_gpu else None)
    if chosen == "native" and on_gpu:
        raise UserError(f"{source}=native is for CPU tensors, and these are on {q.device}")
    if chosen == "triton" and not fits_triton:
        raise UserError(
            f"{source}=triton computes in fp32 with head dims up to {MAX_TRITON_HEAD_DIM}, not {q.dtype} with {head_dim}; "
            "use torch"
        )
    return chosen


def check_devices(x: Tensor, *others: Tensor | None) -> None:
    """Raise ValueError where ``others`` are on another device than ``x``: kernels are given addresses alone."""
    for other in others:
        if other is not None and other.device != x.device:
            raise ValueError(
                f"tensors of one call must be on one device, not on {x.device} and {other.device}"
            )


def compiles(device: torch.device) -> bool:
    """Whether Triton can compile for ``device``; if not, a line in the log says so once."""
    if _interpreted():
        return True
    why = _failure(device)
    if why is not None:
        _say_once(why)
    return why is None


def _checked(name: str, source: str, index: int | None = None) -> Backend:
    if name not in get_args(Backend):
        raise UserError(f"{source}={name} is no attention backend; there are {', '.join(get_args(Backend))}")
    # Under torch.compile the question cannot be traced (it may run a compiler); the operator meets the answer.
    if name in ("native", "triton") and not torch.compiler.is_compiling():
        usable, why = build.status() if name == "native" else _triton_usable(index)
        if not usable:
            raise UserError(f"{source}={name} cannot run here: {why}")
    return cast(Backend, name)


def _native_usable() -> bool:
    return build.status()[0]


# For torch.compile the answer is a constant: torch.compiler.assume_constant_result, which would load the compiler here.
_native_usable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _triton_usable(index: int | None = None) -> tuple[bool, str]:
    """``_triton_status``, and a kernel compiled and run."""
    usable, why = _triton_status(index)
    if usable and not _interpreted():
        failure = _failure(torch.device("cuda", torch.cuda.current_device() if index is None else index))
        if failure is not None:
            return False, f"it cannot compile: {failure}; {_NEEDS}"
    return usable, why


_NEEDS = "Triton needs a C compiler (gcc, clang or CC) and Python.h (python3-dev) on the machine that trains"


def _failure(device: torch.device) -> str | None:
    from dattrain.ops import triton_probe

    return triton_probe.failure(device)


@lru_cache(maxsize=1)
def _say_once(why: str) -> None:
    log.warning(
        "Triton cannot compile (%s): attention on CUDA runs as plain torch, slower and with more memory. %s",
        why,
        _NEEDS,
    )


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _triton_status(index: int | None = None) -> tuple[bool, str]:
    """Whether Triton is for CUDA device ``index`` (the current one when None); not, whether it can compile there."""
    if not _installed():
        return False, "the triton package is not installed"
    if _interpreted():
        return True, "Triton's interpreter (TRITON_INTERPRET is set): for tests, very slow"
    return _device_status(index)


_triton_status._dynamo_marked_constant = True  # type: ignore[attr-defined]


# Asked at each call of an operator, and answered by the driver: each answer is kept.


@lru_cache(maxsize=1)
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@lru_cache(maxsize=64)
def _device_status(index: int | None) -> tuple[bool, str]:
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    if torch.version.hip is not None:
        return True, "AMD GPU through ROCm's Triton; not tested"
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return False, f"{name} has compute capability {capability[0]}.{capability[1]}; 8.0 or newer is needed"
    return True, f"{name}; the default on NVIDIA"
