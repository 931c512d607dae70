"""Cases of bilinear sampling, and what they should give: grid_sample and its gradients in fp64."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Of bf16 twice the rounding error: Triton 3.8's interpreter narrows to it by cutting off.
BOUNDS = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 6e-4, torch.bfloat16: 8e-3}


class Case(NamedTuple):
    batch: int = 2
    groups: int = 2
    height: int = 7
    width: int = 6
    channels: int = 20
    points: int = 9
    spread: float = 1.3
    """Positions reach this far; the map ends at 1."""

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """x, positions and a cotangent; x in ``dtype``."""
        draw = torch.Generator().manual_seed(0)
        wide = torch.promote_types(dtype, torch.float32)
        x = torch.randn(self.batch, self.height, self.width, self.groups * self.channels, generator=draw)
        positions = torch.rand(self.batch, self.groups, self.points, 2, generator=draw) * 2 - 1
        cotangent = torch.randn(self.batch, self.points, self.groups * self.channels, generator=draw)
        return x.to(dtype), positions.to(wide) * self.spread, cotangent.to(dtype)


CASES = {
    "several tiles": Case(batch=1, groups=1, height=10, width=9, channels=130, points=40),
    "odd channels": Case(channels=5),
    "twelve groups": Case(batch=1, groups=12, channels=3, points=3),
    "far outside": Case(batch=1, groups=1, spread=20.0),
    "crowded": Case(batch=1, groups=1, spread=0.1, points=33),
    "one row": Case(batch=1, height=1),
    "one column": Case(batch=1, groups=1, width=1),
    "one pixel": Case(batch=2, groups=1, height=1, width=1, points=1, channels=1),
    "empty batch": Case(batch=0),
}


def exact(x: Tensor, positions: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients of x and positions: F.grid_sample on the CPU, in fp64 from the same numbers."""
    x, positions, cotangent = (t.detach().cpu().double() for t in (x, positions, cotangent))
    x, positions = x.requires_grad_(), positions.requires_grad_()
    batch, height, width, channels = x.shape
    groups, points = positions.shape[1:3]
    maps = x.view(batch, height, width, groups, channels // groups).permute(0, 3, 4, 1, 2).flatten(0, 1)
    grid = positions.flatten(0, 1).flip(-1).unsqueeze(1)
    out = F.grid_sample(maps, grid, align_corners=True).reshape(batch, channels, points).transpose(1, 2)
    return (out, *torch.autograd.grad(out, (x, positions), cotangent))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The largest error as a share of the largest number; NaN where one is found."""
    if not wanted.numel():
        return 0.0
    return ((found.detach().cpu().double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)).item()
