"""Initialisation, by name.

``paper``: what the released models were trained from. The authors' ``reset_parameters`` walks parameters and tests whether
each is a module, so it changes nothing: convolutions and linear layers keep PyTorch's default (uniform within
1/sqrt(fan_in), biases too), and with it the offset networks start from non-zero offsets. Only bias tables are drawn
otherwise, from a normal of std .01.

``trunc_normal``: Swin's habit. Weights of linear layers and convolutions from a normal of std .02, biases zero, tables as
above; offsets so start near zero.

Both call ``trunc_normal_`` as the originals do; it cuts at +-2 in absolute value, not in deviations, so it cuts nothing here.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

from dattrain.errors import UserError
from dattrain.models.blocks import MapConv

Init = Literal["paper", "trunc_normal"]

TABLE_STD = 0.01


def init_table(table: nn.Parameter) -> None:
    """Draw a bias table in place: normal, std .01."""
    nn.init.trunc_normal_(table, std=TABLE_STD)


def init_weights(module: nn.Module, init: Init) -> None:
    """Apply ``init`` to every linear layer and convolution below ``module``, in place.

    Raises:
        UserError: ``init`` is neither ``paper`` nor ``trunc_normal``.
    """
    if init not in get_args(Init):
        raise UserError(f"init={init!r} is not known; choose one of {', '.join(get_args(Init))}")
    for child in module.modules():
        if not isinstance(child, (nn.Linear, nn.Conv2d, MapConv)):
            continue
        if init == "paper":
            child.reset_parameters()
        else:
            nn.init.trunc_normal_(child.weight, std=0.02)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
