"""Operators that torch does not have, each a differentiable function with backends behind it.

``deform_attention`` (in ``deformable_attention``), ``sample``, ``depthwise_conv``, ``window_attention`` and
``biased_attention`` are imported from here, as are ``backends`` and ``use_backend``; ``dispatch`` chooses the backend, and the
environment variable ``DATTRAIN_ATTENTION`` overrides it. ``neighborhood`` is plain torch, imported from its file.
``cpp`` is the CPU's library, ``triton_*`` are the GPU's kernels, ``transforms`` the derivatives beyond the first.

Projections, offsets and everything else of a layer are in ``dattrain.models``. Nothing here imports the rest of the package
but ``errors``.
"""

from dattrain.ops.deformable_attention.api import deform_attention
from dattrain.ops.depthwise import depthwise_conv
from dattrain.ops.dispatch import backends, use_backend
from dattrain.ops.sampling import sample
from dattrain.ops.windows import biased_attention, window_attention

__all__ = [
    "backends",
    "biased_attention",
    "deform_attention",
    "depthwise_conv",
    "sample",
    "use_backend",
    "window_attention",
]
