"""DAT and DAT++; importing this package registers their variants with timm."""

from dattrain.models.zoo import VARIANTS, create, variant_of

__all__ = ["VARIANTS", "create", "variant_of"]
