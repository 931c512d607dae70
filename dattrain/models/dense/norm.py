"""Convolution, normalisation and ReLU of decoders, and dropout of channels as a function of the sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from dattrain.models.arguments import check_choices, check_rates
from dattrain.models.blocks import drop_scale

Norm = Literal["sync", "batch", "group"]


def create_norm(kind: Norm, channels: int) -> nn.Module:
    """A normalisation of B x ``channels`` x H x W maps; weight and bias of ``channels`` each, whichever it is.

    ``sync`` takes its statistics over the micro-batches of all ranks (on CUDA devices alone, as torch's), ``batch`` over one
    device's, ``group`` over groups of a sample's own channels: 32, or the most below that divide the channels into groups of
    eight or more. In groups of two a small decoder hardly learns: each pair keeps little but which of them is larger.

    Raises:
        UserError: another kind.
    """
    check_choices(norm=(kind, Norm))
    if kind == "sync":
        return nn.SyncBatchNorm(channels)
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    most = min(32, max(1, channels // 8))
    return nn.GroupNorm(max(each for each in range(1, most + 1) if channels % each == 0), channels)


@contextmanager
def statistics_kept(module: nn.Module, keep: bool) -> Iterator[None]:
    """Where ``keep``, a BatchNorm of one device's micro-batch normalises with its statistics but adds them to no running average.

    SyncBatchNorm is left alone: its averages are of all ranks, and must be the same on each.
    """
    norms = [each for each in module.modules() if keep and isinstance(each, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before):
            norm.momentum = momentum


class ConvNormReLU(nn.Sequential):
    """mmcv's ConvModule: a convolution that keeps the size, norm, ReLU; B x C x H x W. It has a bias where there is no norm.

    Weights are drawn as there: Kaiming normal over fan-out (``mmcv/cnn/bricks/conv_module.py``).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, norm: Norm | None) -> None:
        conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=norm is None)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        between = [] if norm is None else [create_norm(norm, out_channels)]
        super().__init__(conv, *between, nn.ReLU(inplace=True))


class Classifier(nn.Module):
    """Dropout of whole channels, then a 1 x 1 convolution to classes, drawn from a normal of std .01 (mmseg's BaseDecodeHead)."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        check_rates(dropout=dropout)
        self.dropout = dropout
        self.num_dropped = channels if dropout else 0
        self.conv = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv.weight, std=0.01)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """B x channels x H x W -> B x num_classes x H x W; ``noise`` is B x num_dropped, None draws it."""
        if self.training and self.dropout:
            rates = torch.full((self.num_dropped,), self.dropout, device=x.device)
            x = x * drop_scale(x, rates, noise).to(x.dtype)[:, :, None, None]
        out: Tensor = self.conv(x)
        return out
