"""How fp32 matrices are multiplied on CUDA: what the user told torch, whichever of its interfaces was used."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def products_of(x: Tensor) -> Literal["tf32", "ieee"]:
    """Triton's ``input_precision`` for products of ``x``: TF32 where torch itself would take it, for fp32 alone.

    ``allow_tf32`` and ``get_float32_matmul_precision`` raise once the newer setting was used; this property answers after both.
    """
    allowed = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"
