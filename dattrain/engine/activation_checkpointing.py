"""Activation checkpointing: which activations are recomputed in the backward pass instead of kept.

The models do it themselves with torch's non-reentrant checkpoint. DeepSpeed's own (``deepspeed.checkpointing``) is not
used: it recomputes outside autocast, which gives wrong gradients in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

from torch import nn

from dattrain.errors import UserError

Mode = Literal["none", "stage", "block", "selective"]


def apply(model: nn.Module, mode: Mode) -> None:
    """Set ``model`` (timm's protocol, with our ``mode``) to recompute whole stages, blocks, or interiors; or nothing."""
    if not hasattr(model, "set_grad_checkpointing"):
        if mode != "none":
            raise UserError(
                f"train.activation_checkpointing={mode}, but {type(model).__name__} cannot recompute activations"
            )
        return
    set_mode = cast("Callable[..., None]", model.set_grad_checkpointing)
    if mode == "none":
        set_mode(False)
    else:
        set_mode(True, mode=mode)
