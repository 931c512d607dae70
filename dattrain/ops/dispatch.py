"""Which implementation of the attention core runs: the automatic choice, and how to override it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, cast, get_args

import torch

from dattrain.errors import UserError

Backend = Literal["reference", "torch", "triton"]
ENVIRONMENT_VARIABLE = "DATTRAIN_ATTENTION"
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
    default = "the default on NVIDIA" if torch.cuda.is_available() else "the default here"
    usable, why = _triton_status()
    return [
        BackendStatus("reference", True, "the equations, every matrix materialised: an oracle for tests"),
        BackendStatus("torch", True, "any device; " + ("the default on CPU" if usable else default)),
        BackendStatus("triton", usable, why),
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


def resolve(device: torch.device, asked: str | None) -> Backend:
    """The backend for tensors on ``device``: the argument, else ``use_backend``, else the environment, else the best.

    Raises:
        UserError: if the backend asked for is unknown or cannot run here.
    """
    if asked is not None:
        return _checked(asked, "backend")
    if _chosen:
        return _chosen[-1]
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        return _checked(named, ENVIRONMENT_VARIABLE)
    return "triton" if device.type == "cuda" and _triton_status()[0] else "torch"


def _checked(name: str, source: str) -> Backend:
    if name not in get_args(Backend):
        raise UserError(f"{source}={name} is no attention backend; there are {', '.join(get_args(Backend))}")
    if name == "triton":
        usable, why = _triton_status()
        if not usable:
            raise UserError(f"{source}=triton cannot run here: {why}")
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
