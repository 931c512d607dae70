"""Inputs of the attention core, drawn with a seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dattrain.ops.deformable_attention.coordinates import start_and_step


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
    smooth: bool = False
    """Whether positions are moved so that no query meets the table near a whole index, where slopes jump and the last bit of
    an index decides: for tables 2H-1, whose fractions are then half-odd multiples of 1/H."""

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
        positions = (positions * 2 - 1) * self.spread
        if self.smooth:
            positions = torch.stack([self._smoothed(positions[..., axis], axis) for axis in (0, 1)], -1)
        positions = positions.to(accumulate).requires_grad_()
        return [
            normal(self.batch, self.heads, queries, self.dim),
            normal(self.batch, self.heads, self.keys, self.dim),
            normal(self.batch, self.heads, self.keys, self.dim),
            positions,
            None if self.table is None else normal(self.heads, *self.table, dtype=accumulate),
        ]

    def _smoothed(self, positions: Tensor, axis: int) -> Tensor:
        assert self.table is not None
        size = (self.height, self.width)[axis]
        origin, slope, _ = start_and_step(size, self.table[axis], self.grid)
        return (((origin + slope * positions) * size).floor().add(0.5) / size - origin) / slope

    @property
    def keywords(self) -> dict:
        """Keyword arguments of ``deform_attention``."""
        return {"height": self.height, "width": self.width, "query_grid": self.grid}
