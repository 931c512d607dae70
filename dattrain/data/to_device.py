"""Small things that the host computes for each batch, on their way to the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``; the host waits for nothing.

    A copy from ordinary memory to a GPU stops the host until the stream has come to it, so it goes by way of pinned memory,
    which torch's allocator keeps and gives out again when the copy is done.
    """
    host = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
