"""What the benches measure where nothing else is said. Without torch, since the command line's help lists it."""

from __future__ import annotations

from typing import NamedTuple

DTYPES = ("fp32", "bf16", "fp16")
"""Precisions of weights and activations, by the names that recipes use."""
BASELINE = "swin_tiny_patch4_window7_224"
"""What whole models are compared with."""


class Row(NamedTuple):
    """A row of the throughput table."""

    model: str
    """Ours, or timm's by its name."""
    img_size: int
    v100: float | None = None
    """Images/s on a V100 as the Swin paper prints them (Liu et al., ICCV 2021, Table 1); None where it prints none."""


TABLE = (
    Row("regnety_040", 224, 1156.7),
    Row("regnety_080", 224, 591.6),
    Row("regnety_160", 224, 334.7),
    Row("efficientnet_b3", 300, 732.1),
    Row("efficientnet_b4", 380, 349.4),
    Row("efficientnet_b5", 456, 169.1),
    Row("efficientnet_b6", 528, 96.9),
    Row("efficientnet_b7", 600, 55.1),
    Row("vit_base_patch16_384", 384, 85.9),
    Row("vit_large_patch16_384", 384, 27.3),
    Row("deit_small_patch16_224", 224, 940.4),
    Row("deit_base_patch16_224", 224, 292.3),
    Row("deit_base_patch16_384", 384, 85.9),
    Row("swin_tiny_patch4_window7_224", 224, 755.2),
    Row("swin_small_patch4_window7_224", 224, 436.9),
    Row("swin_base_patch4_window7_224", 224, 278.1),
    Row("swin_base_patch4_window12_384", 384, 84.7),
    Row("swin_large_patch4_window12_384", 384, 42.1),
    Row("resnetv2_101x3_bit", 384),
    Row("resnetv2_152x4_bit", 480),
    Row("pvt_v2_b1", 224),
    Row("pvt_v2_b2", 224),
    Row("pvt_v2_b3", 224),
    Row("pvt_v2_b4", 224),
    Row("pvt_v2_b5", 224),
    Row("dat_tiny", 224),
    Row("dat_small", 224),
    Row("dat_base", 224),
    Row("dat_base", 384),
)
"""The throughput table: every model of the Swin paper's Table 1, PVT v2 beside them, and ours, each at its own resolution."""
VARY = (
    "train.activation_checkpointing=none,selective,block,stage",
    "train.compile=none,block",
    "train.precision=fp32,bf16",
)
"""Settings of a recipe and their values, each an update of its own beside the recipe's."""
