"""Derivatives that an operator with a backward of its own does not have: forward mode, ``torch.func``, second order.

torch leaves the tangent of such an operator out without a word and refuses the rest, so while one of these is under way
``dispatch.resolve`` answers ``reference``: plain torch, which has them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode


def under_way() -> bool:
    """Whether forward-mode AD is on (in any thread), or a transform of ``torch.func`` in this one."""
    # Read here, and not below, so that torch.compile guards on it; the stack of transforms it guards on by itself.
    return forward_ad._current_level >= 0 or _transformed()


def _transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


# For torch.compile a constant, asked where it traces: traced into, the answer would always be yes.
_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def ordinary() -> bool:
    """Whether a tensor made now is one that any later call may use: not a compiler's, a mode's, a trace's or a transform's."""
    return not (
        torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
        or torch._C._get_tracing_state() is not None
        or under_way()
    )


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor
) -> tuple[Tensor | None, ...] | None:
    """In a backward: what it has to give where its result must have derivatives again, by recomputing in plain torch.

    None in an ordinary backward, which needs no more than numbers: the operator's own kernel makes them.

    Args:
        function: the operator as plain torch.
        inputs: its arguments; None and tensors without gradient get None.
        grad: of its result.
    """
    differentiable = torch.is_grad_enabled()  # create_graph
    if not differentiable and not under_way():
        return None
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        # Views, so that an input which was made from another one does not count that one's gradient too.
        views = [x if x is None else x.view_as(x) for x in inputs]
        wanted = [x for x in views if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(function(*views), wanted, grad, create_graph=differentiable))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in views)
