"""Derivatives that an operator with a backward of its own does not have: forward mode, ``torch.func``, second order.

torch leaves the tangent of such an operator out without a word and refuses the rest, so while one of these is under way
``dispatch.resolve`` answers ``reference``: plain torch, which has them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef


def under_way() -> bool:
    """Whether forward-mode AD is on (in any thread), or a transform of ``torch.func`` in this one."""
    # Read here, and not below, so that torch.compile guards on it; the stack of transforms it guards on by itself.
    return forward_ad._current_level >= 0 or _transformed()


def _transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


# For torch.compile a constant, asked where it traces: traced into, the answer would always be yes.
_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def tracing() -> bool:
    """Whether ``torch.jit.trace`` is recording."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


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


def register_autograd(
    operator: CustomOpDef,
    backward: Callable[..., tuple[Tensor, ...]],
    plain: Callable[..., Tensor],
    tensors: int,
) -> None:
    """Give an operator its gradient: ``backward``, or ``plain`` differentiated by torch where ``gradients`` has to.

    Args:
        operator: whose first ``tensors`` arguments are tensors or None, the others settings. A tuple that it returns is kept
            for backward; the gradient of its first entry alone is used.
        backward: takes the result's gradient, the tensors, the tuple that the operator returned if it did, and the settings;
            gives one gradient for each of the first tensors, of which those of None are not looked at.
        plain: the operator's (first) result in plain torch, from the same arguments.
        tensors: how many of the arguments are tensors.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.settings = inputs[tensors:]
        ctx.set_materialize_grads(False)  # no zeros for the results whose gradient is not used
        ctx.save_for_backward(*inputs[:tensors], *(output if isinstance(output, tuple) else ()))

    def run(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        saved, settings = ctx.saved_tensors, ctx.settings
        if grad is None:
            return (None,) * (tensors + len(settings))
        inputs = saved[:tensors]
        grads = gradients(lambda *again: plain(*again, *settings), inputs, grad)
        if grads is None:
            made = backward(grad, *saved, *settings)
            grads = tuple(None if x is None else each for x, each in zip(inputs, made))
        return (*grads, *[None] * (tensors + len(settings) - len(grads)))

    operator.register_autograd(run, setup_context=setup_context)
