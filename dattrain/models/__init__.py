"""DAT and DAT++ as timm models; importing this package registers their variants with timm.

``create`` builds a variant of ``VARIANTS``, ``variant_of`` names a model's. ``dat.DAT`` is the network, of the parts in
``blocks``, ``attention``, ``deformable`` and ``datpp``; ``flops`` counts it; ``surgery`` loads weights of another resolution
or head; ``authors`` converts the authors' checkpoints; ``dense`` has backbones, decoders and heads of dense prediction. Names, not tensors, of released files and everything about reading
files are in ``dattrain.pretrained``; the operators are in ``dattrain.ops``.
"""

from dattrain.models.zoo import VARIANTS, create, variant_of

__all__ = ["VARIANTS", "create", "variant_of"]
