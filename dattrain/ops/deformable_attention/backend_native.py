"""The ``native`` backend: the attention core in C++ (``ops/cpp/attention.cpp``), for CPUs.

How the library is compiled and loaded is in ``dattrain.ops.cpp.build``.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dattrain.ops.cpp import build
from dattrain.ops.cpp.bindings import SUFFIXES
from dattrain.ops.deformable_attention.coordinates import Geometry, Inputs, start_and_step
from dattrain.ops.deformable_attention.layout import tokens_like, unit_stride


def supports(geometry: Geometry) -> bool:
    """Whether the library is there and takes this.

    Logits are scaled after their maximum is taken, so the scale must be positive.
    """
    return geometry.scale > 0 and build.status()[0]


def forward(inputs: Inputs, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Output (as q, laid out as tokens) and log-sum-exp (B x heads x queries, positions' dtype)."""
    q, positions = inputs.q, inputs.positions
    out = tokens_like(q, _stored(q, positions))
    lse = positions.new_empty(q.shape[:3])
    _call(inputs, out, lse, None, (None,) * 3, None, None, geometry)
    return out.to(q.dtype), lse


def backward(
    grad_out: Tensor, inputs: Inputs, out: Tensor, lse: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v (laid out as tokens), positions and table."""
    q, k, v, positions, table = inputs
    batch, heads = q.shape[:2]
    groups, keys = positions.shape[1:3]
    grads = tuple(tokens_like(x, _stored(q, positions)) for x in (q, k, v))
    per_head = positions.new_zeros(batch, heads, keys, 2)
    threads = max(1, min(torch.get_num_threads(), batch * heads))
    tables = None if table is None else positions.new_zeros(threads, *table.shape)
    _call(inputs, out, lse, grad_out, grads, per_head, tables, geometry)
    grad_q, grad_k, grad_v = (x.to(like.dtype) for x, like in zip(grads, (q, k, v)))
    grad_positions = per_head.view(batch, groups, heads // groups, keys, 2).sum(2)
    return grad_q, grad_k, grad_v, grad_positions, None if tables is None else tables.sum(0)


def _call(
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor | None,
    grads: tuple[Tensor | None, ...],
    grad_positions: Tensor | None,
    grad_tables: Tensor | None,
    geometry: Geometry,
) -> None:
    q, k, v, positions, table = inputs
    if not q.shape[0]:
        return
    dtype = _stored(q, positions)
    out = out.to(dtype)
    stored = [unit_stride(x.to(dtype)) for x in (q, k, v, out)]
    matrices = [*stored, *(None if x is None else unit_stride(x.to(dtype)) for x in (grad_out, *grads))]
    strides = [n for x in matrices for n in ((0, 0, 0) if x is None else x.stride()[:3])]
    table = None if table is None else table.contiguous()
    table_shape = (1, 1) if table is None else table.shape[1:]
    memory = [
        *stored[:3], positions.contiguous(), table, stored[3], lse.contiguous(), matrices[4], *matrices[5:],
        grad_positions, grad_tables,
    ]  # fmt: skip
    sizes = [
        q.shape[0],
        q.shape[1],
        positions.shape[1],
        geometry.height,
        geometry.width,
        k.shape[2],
        q.shape[3],
        *table_shape,
    ]
    numbers = [
        *start_and_step(geometry.height, table_shape[0], geometry.grid),
        *start_and_step(geometry.width, table_shape[1], geometry.grid),
        geometry.scale,
    ]
    failed = getattr(build.library(), f"dattrain_core_{SUFFIXES[dtype]}")(
        (ctypes.c_void_p * len(memory))(*(None if x is None else x.data_ptr() for x in memory)),
        (ctypes.c_int64 * len(strides))(*strides),
        (ctypes.c_int64 * len(sizes))(*sizes),
        (ctypes.c_double * len(numbers))(*numbers),
        grad_out is not None,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("the native attention core could not allocate its work space")


def _stored(q: Tensor, positions: Tensor) -> torch.dtype:
    """What the library reads and writes q and the like in: bf16 as it is, everything else in the dtype of positions."""
    narrow = q.dtype == torch.bfloat16 and positions.dtype == torch.float32
    return torch.bfloat16 if narrow else positions.dtype
