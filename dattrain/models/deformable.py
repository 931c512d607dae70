"""Deformable attention: offsets from the query, keys and values sampled at the moved points, bias at their displacements.

Xia et al., Vision Transformer with Deformable Attention, CVPR 2022, section 3.2. Where the paper's text, the authors' CVPR
code and DAT++ differ, the convention is an argument with a name (table in docs/model.md). The attention core and the
sampling are ``dattrain.ops``.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dattrain import ops
from dattrain.models.attention import relative_bias
from dattrain.models.blocks import DepthwiseConv, Interior, to_autocast_dtype
from dattrain.models.init import init_table
from dattrain.models.resize import resize_fixed_table
from dattrain.ops.deformable_attention.coordinates import QueryGrid, steps

Reference = Literal["center", "corner", "shifted"]
Position = Literal["none", "relative", "fixed", "dwconv"]
OffsetRange = float | Literal["free", "tanh", "clamp"]


@dataclass(frozen=True)
class Conventions:
    """How a deformable block places and limits its points; the defaults are the authors' CVPR code.

    Attributes:
        offsets: False leaves the points on the grid (the paper's ablation; the offset network keeps its parameters, which
            Table 6 counts, but its results are not used).
        offset_range: s > 0 limits offsets to s * tanh(.) / (Hk, Wk), in [-1, 1] units (2 is .93 pixels at 14 x 14);
            ``free`` leaves them as they are, ``tanh`` is tanh(reference + offset) (the CVPR code's negative factor),
            ``clamp`` clamps reference + offset to [-1, 1] (DAT++).
        reference: coordinate of reference point i of n: ``center`` (i + .5) / n * 2 - 1 (CVPR code), ``corner``
            i / (n - 1) * 2 - 1 (the paper's text; with the sampling's aligned corners, the pixels themselves),
            ``shifted`` (i + .5) / (n - 1) * 2 - 1 (DAT++).
        query_grid: likewise for the queries, where the bias table is read: ``center`` or ``corner`` (DAT++).
        position: bias ``relative`` at continuous displacements, ``fixed`` per (query, key) pair, ``dwconv`` a depthwise
            convolution of the query added to the output, or ``none``.
    """

    offsets: bool = True
    offset_range: OffsetRange = 2.0
    reference: Reference = "center"
    query_grid: QueryGrid = "center"
    position: Position = "relative"


def reference_points(
    height: int, width: int, kind: Reference, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Reference points of a height x width map in order y, x: height x width x 2."""

    def axis(size: int) -> Tensor:
        index = torch.arange(size, device=device, dtype=dtype)
        if kind == "corner":
            return index / steps(size) * 2 - 1
        return (index + 0.5) / (size if kind == "center" else steps(size)) * 2 - 1

    return torch.stack(torch.meshgrid(axis(height), axis(width), indexing="ij"), -1)


class SharedDepthwiseConv(DepthwiseConv):
    """That of the offset network, shared by the groups, and of the position embedding ``dwconv``."""


class Fp32Linear(nn.Linear):
    """Linear layer in fp32 (fp64 for fp64 input) whatever autocast or the weights' dtype say."""

    def forward(self, x: Tensor) -> Tensor:
        """Any float dtype in, fp32 (or fp64) out."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with _no_autocast(x):
            return F.linear(
                x.to(wide), self.weight.to(wide), None if self.bias is None else self.bias.to(wide)
            )


class OffsetNetwork(nn.Module):
    """Depthwise convolution -> LayerNorm -> GELU -> 1 x 1 to two channels, shared by the groups; then reference + offset.

    Its output is what to hook for a picture of the points.
    """

    def __init__(self, dim: int, groups: int, kernel: int, stride: int, conventions: Conventions) -> None:
        super().__init__()
        self.groups = groups
        self.stride = stride
        self.conventions = conventions
        self.conv = SharedDepthwiseConv(dim // groups, kernel, stride)
        self.norm = nn.LayerNorm(dim // groups)
        self.act = nn.GELU()
        self.proj = Fp32Linear(dim // groups, 2, bias=False)

    def reference(self, height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Reference points for a height x width map of queries: Hk x Wk x 2."""
        rows, columns = -(-height // self.stride), -(-width // self.stride)
        kind = self.conventions.reference if self.conventions.offsets else "corner"
        return reference_points(rows, columns, kind, device, dtype)

    def offsets(self, q: Tensor) -> Tensor:
        """What the network itself gives for B x H x W x C: B x groups x Hk x Wk x 2, not limited yet."""
        features = self.conv(q)
        features = features.reshape(*features.shape[:3], self.groups, -1)
        out: Tensor = self.proj(self.act(self.norm(features))).permute(0, 3, 1, 2, 4)
        return out

    def forward(self, q: Tensor) -> Tensor:
        """Positions of the keys.

        Args:
            q: B x H x W x C.

        Returns:
            B x groups x Hk x Wk x 2 in order y, x, normalised to [-1, 1]; fp32, or fp64 for fp64 ``q``.
        """
        batch, height, width, _ = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        reference = self.reference(height, width, q.device, wide)
        if not self.conventions.offsets:
            return reference.expand(batch, self.groups, -1, -1, -1)
        offset = self.offsets(q)
        rows, columns = offset.shape[2:4]
        limit = self.conventions.offset_range
        if limit == "clamp":
            return (reference + offset).clamp(-1, 1)
        if limit == "tanh":
            return (reference + offset).tanh()
        if limit == "free":
            return reference + offset
        # Along each axis by a Python number, which needs no copy to the device.
        y, x = (offset.tanh() * limit).unbind(-1)
        return reference + torch.stack((y / rows, x / columns), -1)


class DeformableAttention(Interior):
    """Multi-head attention to keys and values sampled at deformed points.

    Works at any map size: positions are normalised, so the bias table, laid out for ``size``, is sampled where it is.

    Args:
        dim, heads, groups: channels; attention heads; offset groups (heads are a multiple of groups).
        size: (height, width) of the map that tables are laid out for.
        kernel, stride: of the offset network; the stride decides how many keys there are.
        conventions: see ``Conventions``.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        groups: int,
        size: tuple[int, int],
        kernel: int,
        stride: int = 1,
        conventions: Conventions = Conventions(),
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.groups = groups
        self.stride = stride
        self.conventions = conventions
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.offset = OffsetNetwork(dim, groups, kernel, stride, conventions)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(drop)
        self.size = size
        self.bias_table: nn.Parameter | None = None
        self.position_conv: SharedDepthwiseConv | None = None
        if conventions.position in ("relative", "fixed"):
            self.bias_table = nn.Parameter(torch.empty(heads, *self.table_size(size)))
            init_table(self.bias_table)
        elif conventions.position == "dwconv":
            self.position_conv = SharedDepthwiseConv(dim)

    def table_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the bias table laid out for a map of ``size``."""
        height, width = size
        if self.conventions.position == "fixed":
            return height * width, -(-height // self.stride) * -(-width // self.stride)
        return 2 * height - 1, 2 * width - 1

    def map_sizes(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(Hq, Wq, Hk, Wk) for a map of ``size``."""
        return (*size, -(-size[0] // self.stride), -(-size[1] // self.stride))

    def on_grid(self, height: int, width: int) -> bool:
        """Whether every key is a pixel and every displacement an entry of the table, so that nothing is interpolated."""
        fits = self.conventions.position != "relative" or (height, width) == self.size
        return not self.conventions.offsets and self.stride == 1 and fits

    def core_flops(self, height: int, width: int) -> int:
        """Cost of sampling and attention for one height x width map, in fvcore's convention.

        Multiply-accumulates of q k^T and of the weighted sum, and 4 per sampled number: of the keys' and values' source
        (Ns x C) and of the bias (heads x H*W x Ns), which the formulation of the paper samples for every pair.
        """
        dim, queries = self.proj.in_features, height * width
        keys = -(-height // self.stride) * -(-width // self.stride)
        flops = 2 * queries * keys * dim
        if self.on_grid(height, width):
            return flops
        bias = self.heads * queries * keys if self.conventions.position == "relative" else 0
        return flops + 4 * (keys * dim + bias)

    def forward(self, x: Tensor) -> Tensor:
        """B x H x W x C to the same."""
        _, height, width, _ = x.shape
        x = to_autocast_dtype(x)
        q = self.q(x)
        if not self.conventions.offsets and torch.is_grad_enabled():
            # DDP waits for a gradient of every parameter: the network that is not run gets zeros, through one pixel.
            q = q + self.offset.offsets(q[:1, :1, :1].detach()).sum().to(q.dtype) * 0
        positions = self.offset(q).flatten(2, 3)
        sampled = x.flatten(1, 2) if self.on_grid(height, width) else ops.sample(x, positions)
        kv = self.kv(sampled)
        return self._run_interior(q, kv, positions)

    def _interior(self, q: Tensor, kv: Tensor, positions: Tensor) -> Tensor:
        """Attention and output projection; q is B x H x W x C, kv B x Ns x 2C, positions B x groups x Ns x 2."""
        batch, height, width, _ = q.shape
        query = q.view(batch, height * width, self.heads, -1).transpose(1, 2)
        # Halves of the channels, so that the gradients of k and v are put together by one copy.
        k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in kv.chunk(2, 2))
        out = self._attend(query, k, v, positions, height, width).transpose(1, 2).reshape(q.shape)
        if self.position_conv is not None:
            out = out + self.position_conv(q)
        projected: Tensor = self.drop(self.proj(out))
        return projected

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, height: int, width: int) -> Tensor:
        table, on_grid = self.bias_table, self.on_grid(height, width)
        if self.conventions.position == "fixed" or on_grid:
            bias = None
            if table is not None and self.conventions.position == "fixed":
                bias = resize_fixed_table(table, self.map_sizes(self.size), self.map_sizes((height, width)))
            elif table is not None:
                bias = relative_bias(table, height, width)
            return ops.biased_attention(q, k, v, None if bias is None else bias.unsqueeze(0))
        return ops.deform_attention(
            q,
            k,
            v,
            positions,
            None if table is None else table.to(positions.dtype),
            height=height,
            width=width,
            query_grid=self.conventions.query_grid if self.conventions.offsets else "corner",
        )


def _no_autocast(x: Tensor) -> nullcontext[None] | torch.autocast:
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
