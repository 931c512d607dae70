"""Small things that the host computes for each batch, on their way to the device: the host waits for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16


def to_device(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``; the host waits for nothing.

    A copy from ordinary memory to a GPU stops the host until the stream has come to it, so it goes by way of pinned memory,
    which torch's allocator keeps and gives out again when the copy is done.
    """
    host = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def stage(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
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
    moved = torch.from_numpy(packed).pin_memory().to(device, non_blocking=True)
    return [
        moved[start : start + array.nbytes]
        .view(torch.from_numpy(np.empty(0, array.dtype)).dtype)
        .view(array.shape)
        for array, start in zip(arrays, starts)
    ]
