"""Small host arrays of a batch on the device, by one copy for which the host does not wait."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

_ALIGNMENT = 16


def stage(arrays: Sequence[NDArray], device: torch.device) -> list[torch.Tensor]:
    """Tensors of the arrays' shapes and dtypes on ``device``; on the CPU they share the arrays' memory.

    On CUDA all arrays go through one page-locked buffer, new for each call, and one copy on the current stream. torch's
    host allocator gives a page-locked buffer to nobody else before the copies out of it are done, so it may be dropped at
    once. The tensors are views of one device buffer, which lives as long as any of them.
    """
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    starts, total = [], 0
    for array in arrays:
        starts.append(total)
        total += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    if not total:
        return [torch.from_numpy(array).to(device) for array in arrays]
    packed = np.empty(total, dtype=np.uint8)
    for array, start in zip(arrays, starts):
        packed[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    moved = pinned(packed).to(device, non_blocking=True)
    return [
        moved[start : start + array.nbytes]
        .view(torch.from_numpy(np.empty(0, array.dtype)).dtype)
        .view(array.shape)
        for array, start in zip(arrays, starts)
    ]


def pinned(array: NDArray[np.uint8]) -> torch.Tensor:
    """A copy in page-locked memory."""
    return torch.from_numpy(array).pin_memory()
