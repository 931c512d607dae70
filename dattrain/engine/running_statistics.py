"""Running statistics of BatchNorm: what training changes in a model beside its parameters, and no optimizer knows of.

Training does not read them; evaluation and export do. They are no part of the average of the weights (``ema``), whose evaluation
takes the live ones.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class RunningStatistics:
    """Of ``model``, whose buffers must stay the tensors that they are; it may have none.

    Args:
        model: on its device, as the engine runs it.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._all = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        self._before = [torch.empty_like(buffer) for buffer in self._all]
        # Over all ranks they are the same already.
        self._own = [
            buffer
            for norm in norms
            if not isinstance(norm, nn.SyncBatchNorm)
            for buffer in norm.buffers(recurse=False)
            if buffer.is_floating_point()
        ]

    @torch.no_grad()
    def remember(self) -> None:
        """Note them, before an update."""
        if self._all:
            torch._foreach_copy_(self._before, self._all)

    @torch.no_grad()
    def restore(self) -> None:
        """Make them what they were: an update that was skipped has seen what is not finite."""
        if self._all:
            torch._foreach_copy_(self._all, self._before)

    @torch.no_grad()
    def average(self) -> None:
        """Give all ranks the mean of theirs, before they are saved or evaluated. Collective.

        They are means over updates, so it makes no difference to later ones when this happened, but for rounding.
        """
        if not self._own or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        flat = torch.cat([buffer.float().reshape(-1) for buffer in self._own])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        means: tuple[Tensor, ...] = flat.split([buffer.numel() for buffer in self._own])
        for buffer, mean in zip(self._own, means):
            buffer.copy_(mean.view_as(buffer))
