"""The core of deformable attention: one function, with backends behind it.

``deform_attention`` and ``sample`` are differentiable torch functions; ``use_backend`` and the environment variable
``DATTRAIN_ATTENTION`` override the automatic choice that ``backends`` explains. Projections, offsets and everything else
of the layer are in ``dattrain.models``.
"""

from dattrain.ops.attention import deform_attention
from dattrain.ops.dispatch import backends, use_backend
from dattrain.ops.sampling import sample

__all__ = ["backends", "deform_attention", "sample", "use_backend"]
