"""The core as torch operators, ``torch.ops.dattrain.deform_attention`` and its ``_backward``.

As operators with shapes for fake tensors and a backward of their own they pass through torch.compile, torch.export,
activation checkpointing and DeepSpeed whole. For backward q, k, v, positions, table, output and (Triton) the
log-sum-exp are kept: nothing of size queries x keys.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dattrain.ops import dispatch, native, transforms
from dattrain.ops.deformable_attention import backend_reference, backend_torch
from dattrain.ops.deformable_attention.coordinates import QueryGrid
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
    if backend == "triton" and dispatch.compiles(q.device):
        from dattrain.ops.deformable_attention import backend_triton

        with torch.cuda.device_of(q):  # Triton launches on the current device, whatever the tensors are on
            return backend_triton.forward(q, k, v, positions, table, height, width, _grid(grid), scale)
    if backend == "native" and _native(height, width, table, grid, scale):
        return native.forward(q, k, v, positions, table, height, width, _grid(grid), scale)
    lse = positions.new_empty((0,) if backend == "torch" else q.shape[:3])
    with torch.autocast(q.device.type, enabled=False):
        out = backend_torch.forward(q, k, v, positions, table, height, width, _grid(grid), scale)
    return out, lse


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor | None,
    height: int,
    width: int,
    grid: str,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    lse = positions.new_empty((0,) if backend == "torch" else q.shape[:3])
    return tokens_like(q), lse


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
    if backend == "triton" and dispatch.compiles(q.device):
        from dattrain.ops.deformable_attention import backend_triton

        with torch.cuda.device_of(q):
            grads = backend_triton.backward(
                grad_out, q, k, v, positions, table, out, lse, height, width, _grid(grid), scale
            )
    elif backend == "native" and _native(height, width, table, grid, scale):
        grads = native.backward(
            grad_out, q, k, v, positions, table, out, lse, height, width, _grid(grid), scale
        )
    else:
        with torch.autocast(q.device.type, enabled=False):
            grads = backend_torch.backward(
                grad_out, q, k, v, positions, table, out, height, width, _grid(grid), scale
            )
    return (*grads[:4], positions.new_empty(0) if grads[4] is None else grads[4])


@attention_backward.register_fake
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor | None,
    out: Tensor,
    lse: Tensor,
    height: int,
    width: int,
    grid: str,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        tokens_like(q),
        tokens_like(k),
        tokens_like(v),
        positions.new_empty(positions.shape),
        positions.new_empty((0,) if table is None else table.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, positions, table, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, positions, table, *output)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, positions, table, out, lse = ctx.saved_tensors
    height, width, grid, scale, _ = ctx.settings
    again = transforms.gradients(
        lambda q, k, v, positions, table: backend_reference.deform_attention(
            q, k, v, positions, table, height, width, _grid(grid), scale
        ),
        (q, k, v, positions, table),
        grad_out,
    )
    if again is not None:
        return (*again, None, None, None, None, None)
    *grads, grad_table = attention_backward(grad_out, q, k, v, positions, table, out, lse, *ctx.settings)
    return (*grads, None if table is None else grad_table, None, None, None, None, None)


attention.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.dattrain.deform_attention)
def _flops(q: Any, k: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two products of queries and keys, as torch counts scaled_dot_product_attention; sampling the bias is not counted."""
    batch, heads, queries, dim = q
    return 4 * batch * heads * queries * k[2] * dim


@register_flop_formula(torch.ops.dattrain.deform_attention_backward)
def _flops_backward(grad_out: Any, q: Any, k: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Five products, one of them recomputed."""
    batch, heads, queries, dim = q
    return 10 * batch * heads * queries * k[2] * dim


def _native(height: int, width: int, table: Tensor | None, grid: str, scale: float) -> bool:
    """Whether the native library takes this; if not, the blocks of plain torch do."""
    return native.status()[0] and native.supports(height, width, table, _grid(grid), scale)


def _grid(name: str) -> QueryGrid:
    return "center" if name == "center" else "corner"
