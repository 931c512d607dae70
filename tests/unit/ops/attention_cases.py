"""Inputs of the attention core, drawn with a seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Shape of one call."""

    batch: int = 2
    heads: int = 4
    groups: int = 2
    height: int = 3
    width: int = 5
    keys: int = 7
    dim: int = 8
    table: tuple[int, int] | None = (5, 9)
    grid: str = "center"
    spread: float = 1.7
    """Positions are uniform in [-spread, spread]: above 1, some lie outside the map."""

    def inputs(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor | None]:
        """q, k, v, positions, table, all requiring gradients."""
        generator = torch.Generator().manual_seed(seed)
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32

        def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

        queries = self.height * self.width
        positions = torch.rand(
            self.batch, self.groups, self.keys, 2, generator=generator, dtype=torch.float64
        )
        positions = ((positions * 2 - 1) * self.spread).to(accumulate).requires_grad_()
        return [
            normal(self.batch, self.heads, queries, self.dim),
            normal(self.batch, self.heads, self.keys, self.dim),
            normal(self.batch, self.heads, self.keys, self.dim),
            positions,
            None if self.table is None else normal(self.heads, *self.table, dtype=accumulate),
        ]

    @property
    def keywords(self) -> dict:
        """Keyword arguments of ``deform_attention``."""
        return {"height": self.height, "width": self.width, "query_grid": self.grid}
