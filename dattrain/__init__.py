"""Pre-train and fine-tune DAT, the Vision Transformer with Deformable Attention (CVPR 2022), at ImageNet-22K scale.

``dattrain.train``, ``evaluate``, ``predict``, ``load_model`` and ``Run`` are for notebooks and scripts (``dattrain.api``). Which
subpackage holds what is in docs/structure.md. Importing this loads nothing else: a job's script on a node's own Python does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dattrain.api import Run, evaluate, load_model, predict, train

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "evaluate", "load_model", "predict", "train"]


def __getattr__(name: str) -> Any:
    """Load the Python API when one of its names is asked for."""
    if name in __all__:
        from dattrain import api

        return getattr(api, name)
    raise AttributeError(f"module 'dattrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The Python API: what a notebook completes."""
    return sorted(__all__)
