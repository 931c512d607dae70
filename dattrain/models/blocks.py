"""What is between the attentions: patch convolutions, MLP, drop path, block. All maps are B x H x W x C, channels last.

Attention itself is in ``attention``; the assembly of stages is in ``dat``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dattrain import ops


def recompute(function: Callable[..., Any], *args: Any, random: bool = False) -> Any:
    """Run ``function`` under torch's non-reentrant activation checkpoint.

    Its early stop ends the recomputation where the last saved tensor was packed, so a closing matrix product whose output
    nobody saves is not run a second time. ``random`` keeps the generator's state, for functions that draw (dropout).
    """
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=random)


def to_autocast_dtype(x: Tensor) -> Tensor:
    """Cast x to the dtype that autocast gives matrix products, if it is on: before a map is moved, not after."""
    device = x.device.type
    if x.dtype != torch.float32 or x.is_meta or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def check_channels(x: Tensor, channels: int, axis: int) -> None:
    """Refuse what is no batch of images (``axis`` 1) or maps (-1) of so many channels.

    Raises:
        ValueError: the shape, and what was expected.
    """
    if x.dim() != 4 or x.shape[axis] != channels:
        wanted = f"B x {channels} x H x W" if axis == 1 else f"B x H x W x {channels}"
        found = f"{x.shape[axis]} channels" if x.dim() == 4 else f"{x.dim()} dimensions"
        raise ValueError(f"expected {channels} channels ({wanted}), got {found}: {tuple(x.shape)}")


def check_images(x: Tensor, channels: int, only_size: tuple[int, int] | None) -> None:
    """Refuse what is no batch of images, B x ``channels`` x H x W, or of another (H, W) than ``only_size``.

    Raises:
        ValueError: the shape, and what was expected.
    """
    check_channels(x, channels, 1)
    if only_size is not None and tuple(x.shape[2:]) != only_size:
        raise ValueError(
            f"expected images of {only_size} alone (strict_img_size=True), got {tuple(x.shape[2:])}"
        )


def drop_path_rates(depth: int, last: float, device: torch.device | None = None) -> Tensor:
    """Rate of each residual branch of ``depth`` blocks of two, 2 * depth fp32: from 0 to ``last``, linear over the blocks."""
    return torch.linspace(0, last, depth, device=device).repeat_interleave(2)


def drop_scale(x: Tensor, rates: Tensor, noise: Tensor | None) -> Tensor:
    """Factor of each branch (or channel) of each sample: 0 where it is dropped, else 1 / (1 - rate).

    Args:
        x: the batch, B x ...; its length and device are used.
        rates: n fp32, in [0, 1).
        noise: B x n fp32 uniforms in [0, 1): dropped where below the rate. None draws from torch's generator.

    Returns:
        B x n fp32.

    Raises:
        ValueError: noise of another shape.
    """
    wanted = (x.shape[0], len(rates))
    if noise is None:
        noise = torch.rand(wanted, device=x.device)
    elif tuple(noise.shape) != wanted:
        raise ValueError(f"drop_path_noise is {tuple(noise.shape)}, not {wanted}")
    return torch.where(noise < rates, torch.zeros_like(rates), 1 / (1 - rates))


class MapConv(nn.Module):
    """Weight and bias of a convolution, shaped and drawn as ``nn.Conv2d``'s, for B x H x W x C maps.

    It is no ``nn.Conv2d``, which tools take for B x C x H x W in and out, and for its constructor.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int,
        padding: int = 0,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.padding = (kernel, kernel), (stride, stride), (padding, padding)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, kernel, kernel))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias anew: uniform within 1 / sqrt(fan-in), both."""
        nn.Conv2d.reset_parameters(self)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """What ``print`` shows of it."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"groups={self.groups}, bias={self.bias is not None}"
        )


class DepthwiseConv(MapConv):
    """k x k depthwise convolution of a B x H x W x C map; maps of several times ``channels`` share its kernels by groups."""

    def __init__(self, channels: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(channels, channels, kernel, stride, kernel // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """B x H x W x (groups * channels) -> B x ceil(H / stride) x ceil(W / stride) x (groups * channels)."""
        assert self.bias is not None
        return ops.depthwise_conv(to_autocast_dtype(x), self.weight, self.bias, self.stride[0])


class Interior(nn.Module):
    """A module that can recompute what lies between its matrix products: activation checkpointing's ``selective`` mode."""

    checkpoint_interior: bool = False
    drop: nn.Dropout
    _interior: Callable[..., Tensor]

    def _run_interior(self, first: Tensor, *others: Tensor | None) -> Tensor:
        """``_interior`` of these tensors."""
        if self.checkpoint_interior and first.requires_grad:
            out: Tensor = recompute(self._interior, first, *others, random=self.drop.p > 0)
            return out
        return self._interior(first, *others)


class PatchConv(MapConv):
    """Convolution of a map whose stride is its kernel, as one matrix product over patches.

    Maps whose size the kernel does not divide are padded with zeros at right and bottom, so no pixel is lost.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel, kernel, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """B x H x W x in_channels -> B x ceil(H / kernel) x ceil(W / kernel) x out_channels."""
        check_channels(x, self.in_channels, -1)
        kernel = self.kernel_size[0]
        x = F.pad(x, (0, 0, 0, -x.shape[2] % kernel, 0, -x.shape[1] % kernel))
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // kernel, kernel, width // kernel, kernel, channels)
        x, weight = x.permute(0, 1, 3, 2, 4, 5), self.weight.permute(0, 2, 3, 1)
        return F.linear(x.flatten(3), weight.flatten(1), self.bias)


class PatchProjection(nn.Conv2d):
    """``nn.Conv2d`` of images, constructor and all, whose stride is its kernel: one matrix product over patches.

    B x C x H x W in and out as a view of channels-last memory, so that tools which wrap, prune or adapt convolutions may.
    """

    def forward(self, x: Tensor) -> Tensor:
        """H and W are multiples of the kernel's."""
        height, width = self.kernel_size
        rows, columns = x.shape[2] // height, x.shape[3] // width
        x = x.reshape(x.shape[0], x.shape[1], rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
        return F.linear(x.flatten(3), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """Stem: non-overlapping patches of the image, then LayerNorm.

    B x C x H x W -> B x ceil(H / patch) x ceil(W / patch) x dim; padded with zeros at right and bottom to whole patches.
    """

    only_size: tuple[int, int] | None = None

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchProjection(in_chans, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim)
        self.in_chans = in_chans

    def forward(self, x: Tensor) -> Tensor:
        """Map of a batch of images."""
        check_images(x, self.in_chans, self.only_size)
        x = F.pad(x, (0, -x.shape[3] % self.patch_size, 0, -x.shape[2] % self.patch_size))
        out: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return out


class Downsample(nn.Module):
    """Between stages: 2 x 2 convolution of stride 2 without bias, then LayerNorm (Swin normalises first)."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = PatchConv(dim, out_dim, 2, bias=False)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """B x H x W x dim -> B x ceil(H / 2) x ceil(W / 2) x out_dim."""
        out: Tensor = self.norm(self.conv(x))
        return out


class Mlp(Interior):
    """Linear, exact GELU, linear. ``checkpoint_interior`` recomputes the activation in the backward pass."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def _interior(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.drop(self.fc2(self.drop(self.act(hidden))))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """B x H x W x dim to the same."""
        return self._run_interior(self.fc1(x))


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)); before both, x + local(x) where DAT++ has a perception unit."""

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, local: nn.Module | None = None) -> None:
        super().__init__()
        self.local = local
        self.norm1 = nn.LayerNorm(dim)
        self.attn: nn.Module = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp: nn.Module = mlp

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """One block.

        Args:
            x: B x H x W x C.
            scale: B x 2 fp32, the factor of each sample's two residual branches: 0 where drop path drops it, else
                1 / (1 - rate); None without drop path.
        """
        if self.local is not None:
            x = x + self.local(x)
        x = x + _scaled(self.attn(self.norm1(x)), scale, 0)
        return x + _scaled(self.mlp(self.norm2(x)), scale, 1)


def _scaled(branch: Tensor, scale: Tensor | None, column: int) -> Tensor:
    if scale is None:
        return branch
    return branch * scale[:, column].to(branch.dtype).view(-1, 1, 1, 1)


class Stage(nn.Module):
    """Downsampling (but for the first stage), then blocks on B x H x W x C."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.checkpoint_blocks = False

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """x: B x H x W x C; scale: B x (2 * blocks), see ``Block``."""
        x = self.downsample(x)
        for index, block in enumerate(self.blocks):
            columns = None if scale is None else scale[:, 2 * index : 2 * index + 2]
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = recompute(block, x, columns, random=has_dropout(block))
            else:
                x = block(x, columns)
        return x


def has_dropout(module: nn.Module) -> bool:
    """Whether dropout below ``module`` draws random numbers, whose generator a checkpoint must then restore."""
    return any(isinstance(child, nn.Dropout) and child.p > 0 for child in module.modules())
