"""Whether Triton can compile here: it needs a C compiler and Python.h at run time, which a machine may lack."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import _disable_current_modes


@triton.jit
def _store(x):
    tl.store(x, 1.0)


@lru_cache(maxsize=64)
def failure(device: torch.device) -> str | None:
    """Why a kernel of one line cannot be compiled and run on ``device``, in one line; None if it can.

    Some seconds for the first process of a machine; then it is found in Triton's cache.
    """
    try:
        # Asked under fake tensors or a tracer too; the answer is about the machine.
        with _disable_current_modes(), torch.cuda.device(device):
            _store[(1,)](torch.empty(1, device=device))
    except Exception as error:  # of the compiler, the linker, the driver: whatever it is, kernels do not run
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None
