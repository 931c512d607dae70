"""The core as torch operators, ``torch.ops.dattrain.deform_attention`` and its ``_backward``.

As operators with shapes for fake tensors and a backward of their own they pass through torch.compile, torch.export,
activation checkpointing and DeepSpeed as one node each. Operators take plain arguments; a ``Geometry`` is made of them
here. For backward q, k, v, positions, table, output and (not ``torch``) the log-sum-exp are kept: nothing of size queries x keys.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dattrain.ops import dispatch, transforms
from dattrain.ops.deformable_attention import backend_native, backend_reference, backend_torch
from dattrain.ops.deformable_attention.coordinates import Geometry, Inputs, QueryGrid
from dattrain.ops.deformable_attention.layout import tokens_like


@torch.library.custom_op("dattrain::deform_attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Optional[Tensor],  # noqa: UP045 (torch reads the schema from it on Python 3.10)
    height: int,
    width: int,
    grid: str,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output (laid out as tokens, B x queries x heads x d), and the log-sum-exp of the logits (fp32, B x heads x queries) where the backend keeps it, else empty.

    Arguments are those of ``dattrain.ops.deform_attention`` after its checks; ``table`` has the dtype of positions.
    """
    inputs = Inputs(q, k, v, positions, table)
    geometry = Geometry(height, width, _grid(grid), scale)
    if backend == "triton" and dispatch.compiles(q.device):
        from dattrain.ops.deformable_attention import backend_triton

        with torch.cuda.device_of(q):  # Triton launches on the current device, whatever the tensors are on
            return backend_triton.forward(inputs, geometry)
    if backend == "native" and backend_native.supports(geometry):
        return backend_native.forward(inputs, geometry)
    with torch.autocast(q.device.type, enabled=False):
        out = backend_torch.forward(inputs, geometry)
    return out, _new_lse(q, positions, backend)


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    return tokens_like(q), _new_lse(q, positions, settings[-1])


def _new_lse(q: Tensor, positions: Tensor, backend: str) -> Tensor:
    """Uninitialised, or empty: ``torch`` keeps none, and where it runs instead of another, nobody reads it."""
    return positions.new_empty((0,) if backend == "torch" else q.shape[:3])


@torch.library.custom_op("dattrain::deform_attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Optional[Tensor],  # noqa: UP045
    out: Tensor,
    lse: Tensor,
    height: int,
    width: int,
    grid: str,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, positions and table (empty where there is no table)."""
    inputs = Inputs(q, k, v, positions, table)
    geometry = Geometry(height, width, _grid(grid), scale)
    if backend == "triton" and dispatch.compiles(q.device):
        from dattrain.ops.deformable_attention import backend_triton

        with torch.cuda.device_of(q):
            grads = backend_triton.backward(grad_out, inputs, out, lse, geometry)
    elif backend == "native" and backend_native.supports(geometry):
        grads = backend_native.backward(grad_out, inputs, out, lse, geometry)
    else:
        with torch.autocast(q.device.type, enabled=False):
            grads = backend_torch.backward(grad_out, inputs, out, geometry)
    return (*grads[:4], positions.new_empty(0) if grads[4] is None else grads[4])


@attention_backward.register_fake
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        tokens_like(q),
        tokens_like(k),
        tokens_like(v),
        positions.new_empty(positions.shape),
        positions.new_empty((0,) if table is None else table.shape),
    )


def _equations(*arguments: Any) -> Tensor:
    """The operator's, by the equations."""
    height, width, grid, scale, _ = arguments[5:]
    geometry = Geometry(height, width, _grid(grid), scale)
    return backend_reference.deform_attention(Inputs(*arguments[:5]), geometry)


transforms.register_autograd(attention, attention_backward, _equations, tensors=5)


@register_flop_formula(torch.ops.dattrain.deform_attention)
def _flops(q: torch.Size, k: torch.Size, *_: Any, **__: Any) -> int:
    """Two products of queries and keys, as torch counts scaled_dot_product_attention; sampling the bias is not counted."""
    batch, heads, queries, dim = q
    return 4 * batch * heads * queries * k[2] * dim


@register_flop_formula(torch.ops.dattrain.deform_attention_backward)
def _flops_backward(grad_out: torch.Size, q: torch.Size, k: torch.Size, *_: Any, **__: Any) -> int:
    """Five products, one of them recomputed."""
    batch, heads, queries, dim = q
    return 10 * batch * heads * queries * k[2] * dim


def _grid(name: str) -> QueryGrid:
    return "center" if name == "center" else "corner"
