"""What DAT++ (arXiv 2309.01430) adds to DAT, on B x H x W x C maps: stages and blocks are those of ``dat``.

Convolutional stem and downsampling, the local perception unit, the MLP with a depthwise convolution, and neighbourhood
attention in place of windows. Its deformable attention is ``deformable``'s with other conventions (corner query grid,
reference points over size - 1, offsets without range limit, clamped to the map).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dattrain.models.blocks import DepthwiseConv, Interior, check_images
from dattrain.ops.neighborhood import neighborhood_attention


def conv_map(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution on a B x H x W x C map: the permuted view is channels-last memory, so nothing is copied."""
    out: Tensor = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return out


class ConvStem(nn.Module):
    """3 x 3 convolution, LayerNorm, GELU, 3 x 3 convolution, LayerNorm, each of stride patch_size / 2.

    B x C x H x W image to a B x H/patch x W/patch x dim map.
    """

    only_size: tuple[int, int] | None = None

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        stride = patch_size // 2
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride, 1)
        self.norm1 = nn.LayerNorm(dim // 2)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride, 1)
        self.norm2 = nn.LayerNorm(dim)
        self.in_chans = in_chans

    def forward(self, x: Tensor) -> Tensor:
        """Map of a batch of images."""
        check_images(x, self.in_chans, self.only_size)
        x = self.conv1(x).permute(0, 2, 3, 1)
        out: Tensor = self.norm2(conv_map(self.conv2, self.act(self.norm1(x))))
        return out


class ConvDownsample(nn.Module):
    """3 x 3 convolution of stride 2 without bias, then LayerNorm."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, 2, 1, bias=False)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """B x H x W x dim -> B x ceil(H / 2) x ceil(W / 2) x out_dim."""
        out: Tensor = self.norm(conv_map(self.conv, x))
        return out


class LocalPerception(DepthwiseConv):
    """3 x 3 depthwise convolution of a map; the block adds it to its input."""


class ConvMlp(Interior):
    """Linear, plus a 3 x 3 depthwise convolution of itself, exact GELU, linear."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def _interior(self, hidden: Tensor) -> Tensor:
        hidden = self.drop(hidden)
        out: Tensor = self.drop(self.fc2(self.act(hidden + self.dwconv(hidden))))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """B x H x W x dim to the same."""
        return self._run_interior(self.fc1(x))


class NeighborhoodAttention(Interior):
    """Attention to the ``kernel`` x ``kernel`` window around each token, shifted inside at the border.

    Args:
        kernel: odd side of the window. Maps smaller than it are attended whole.
    """

    def __init__(self, dim: int, heads: int, kernel: int, drop: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.kernel = kernel
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(drop)
        self.bias_table = nn.Parameter(torch.empty(heads, 2 * kernel - 1, 2 * kernel - 1))
        nn.init.trunc_normal_(self.bias_table, std=0.02)  # NATTEN's; the other tables have .01

    def core_flops(self, height: int, width: int) -> int:
        """Multiply-accumulates of q k^T and of the weighted sum for one map, keys inside the windows alone."""
        keys = min(self.kernel, height) * min(self.kernel, width)
        return 2 * height * width * keys * self.proj.in_features

    def forward(self, x: Tensor) -> Tensor:
        """B x H x W x C to the same."""
        return self._run_interior(self.qkv(x))

    def _interior(self, qkv: Tensor) -> Tensor:
        batch, height, width, _ = qkv.shape
        q, k, v = qkv.view(batch, height, width, 3, self.heads, -1).permute(3, 0, 4, 1, 2, 5)
        out = neighborhood_attention(q, k, v, self.bias_table, kernel_size=self.kernel)
        projected: Tensor = self.drop(self.proj(out.permute(0, 2, 3, 1, 4).reshape(batch, height, width, -1)))
        return projected
