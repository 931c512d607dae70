"""The core of deformable attention, and what feeds it: functions with backends behind them.

``deform_attention``, ``sample``, ``depthwise_conv`` and ``window_attention`` are differentiable torch functions; ``use_backend`` and the environment variable
``DATTRAIN_ATTENTION`` override the automatic choice that ``backends`` explains. Projections, offsets and everything else
of the layer are in ``dattrain.models``.
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
