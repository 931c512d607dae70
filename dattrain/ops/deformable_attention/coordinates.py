"""Where queries and keys meet the bias table: coordinates separable by axis.

The bias of query (i, j) and key k is the table read at ``(query - position) / 2`` (Xia et al., CVPR 2022, eq. 9). Along
one axis that is ``table_index[k, i] = start[k] + i * step``: keys times (height + width) numbers describe all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

QueryGrid = Literal["center", "corner"]


class Inputs(NamedTuple):
    """The tensors of a call of the attention core, as ``deform_attention`` has them; ``table`` in the dtype of positions."""

    q: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor
    table: Tensor | None


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a call of the attention core knows beside its tensors.

    Attributes:
        height, width: rows and columns of the queries' map.
        grid: where its queries lie, see ``query_coordinates``.
        scale: multiplies q k^T.
    """

    height: int
    width: int
    grid: QueryGrid
    scale: float


def query_coordinates(size: int, grid: QueryGrid, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Normalised coordinate of each of ``size`` query rows (or columns), shape (size,).

    ``center`` is ``(i + .5) / size * 2 - 1`` (DAT's released CVPR code), ``corner`` is ``i / max(size - 1, 1) * 2 - 1``
    (DAT++).
    """
    index = torch.arange(size, device=device, dtype=dtype)
    if grid == "center":
        return (index + 0.5) / size * 2 - 1
    return index / steps(size) * 2 - 1


def steps(size: Any) -> int:
    """Steps from the first to the last of ``size`` pixels, and 1 for a single one.

    Under ``torch.jit.trace`` sizes are tensors, of which Python's ``max`` would take one for good.
    """
    return (size - 1).clamp(min=1) if isinstance(size, Tensor) else max(size - 1, 1)  # type: ignore[return-value]


def start_and_step(size: int, table_size: int, grid: QueryGrid) -> tuple[float, float, float]:
    """(a, b, step) such that ``table_index[k, i] = a + b * position[k] + step * i``."""
    half = (table_size - 1) / 2
    first, last = (1 / size - 1, 1 - 1 / size) if grid == "center" else (-1.0, 1.0 if size > 1 else -1.0)
    step = (last - first) / 2 * half / max(size - 1, 1)
    return (first / 2 + 1) * half, -half / 2, step
