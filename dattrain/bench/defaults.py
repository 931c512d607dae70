"""What the benches measure where nothing else is said. Without torch, since the command line's help lists it."""

from __future__ import annotations

DTYPES = ("fp32", "bf16", "fp16")
"""Precisions of weights and activations, by the names that recipes use."""
TABLE = (
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "vit_base_patch16_224",
    "regnety_040",
    "regnety_080",
    "regnety_160",
    "efficientnet_b3",
    "efficientnet_b4",
    "swin_tiny_patch4_window7_224",
    "swin_small_patch4_window7_224",
    "swin_base_patch4_window7_224",
    "dat_tiny",
    "dat_small",
    "dat_base",
)
"""The throughput table: the models that the papers compare with, and ours."""
VARY = (
    "train.activation_checkpointing=none,selective,block,stage",
    "train.compile=none,block",
    "train.precision=fp32,bf16",
)
"""Settings of a recipe and their values, each an update of its own beside the recipe's."""
