"""The public function of deformable attention's core: checks, autocast, choice of backend."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from dattrain.ops.deformable_attention import backend_reference, torch_op
from dattrain.ops.deformable_attention.coordinates import Geometry, Inputs, QueryGrid
from dattrain.ops.dispatch import Backend, check_devices, resolve


def deform_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    bias_table: Tensor | None,
    *,
    height: int,
    width: int,
    query_grid: QueryGrid = "center",
    scale: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Deformable multi-head attention: softmax(scale * q k^T + bias) v (Xia et al., CVPR 2022, eq. 9).

    The bias of a query and a key is the head's table read bilinearly (corners aligned, zeros outside) at
    ``(query - position) / 2``. Logits, bias, softmax and the gradients of positions and table are computed in the
    dtype of ``positions``, whatever q, k, v are; the ``triton`` backend rounds the table it reads to fp16 beside bf16 and
    fp16 queries. Under autocast q, k, v are cast to its dtype; positions never are.

    Args:
        q: B x heads x (height*width) x d, rows first; any float dtype.
        k: B x heads x Ns x d, dtype of q.
        v: B x heads x Ns x d, dtype of q.
        positions: B x groups x Ns x 2 in order y, x, normalised to [-1, 1], fp32, or fp64 when q is fp64. Points
            outside are fine; one that is not finite makes its group's output NaN. Head h reads the positions of group ``h // (heads // groups)``.
        bias_table: heads x Th x Tw, or None for no bias.
        height: query rows.
        width: query columns.
        query_grid: ``center`` puts query row i at ``(i + .5) / height * 2 - 1`` (CVPR), ``corner`` at
            ``i / max(height - 1, 1) * 2 - 1`` (DAT++).
        scale: multiplies q k^T; ``d ** -.5`` when None.
        backend: overrides ``dattrain.ops.use_backend``, ``DATTRAIN_ATTENTION`` and the automatic choice.

    Returns:
        B x heads x (height*width) x d, in the dtype of q (autocast's under autocast). In memory it is laid out as tokens,
        so that ``out.transpose(1, 2).reshape(B, height*width, heads*d)`` copies nothing (except from ``reference``).

    Raises:
        ValueError: if shapes or dtypes do not fit together.
        UserError: if the backend is unknown or cannot run here.
    """
    # The meta device, where shapes and FLOPs are counted, knows no autocast.
    autocast = not q.is_meta and torch.is_autocast_enabled(q.device.type)
    if autocast and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check(Inputs(q, k, v, positions, bias_table), height, width, query_grid)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    table = None if bias_table is None else bias_table.to(positions.dtype)
    chosen = resolve(q, backend, q.shape[-1])
    if chosen == "reference":
        with torch.autocast(q.device.type, enabled=False) if autocast else nullcontext():
            geometry = Geometry(height, width, query_grid, scale)
            return backend_reference.deform_attention(Inputs(q, k, v, positions, table), geometry)
    out: Tensor = torch_op.attention(q, k, v, positions, table, height, width, query_grid, scale, chosen)[0]
    return out


def _check(inputs: Inputs, height: int, width: int, query_grid: str) -> None:
    q, k, v, positions, bias_table = inputs
    if query_grid not in ("center", "corner"):
        raise ValueError(f"query_grid={query_grid!r} is neither 'center' nor 'corner'")
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            f"q, k, v must be B x heads x length x d, k and v alike, not {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    check_devices(q, k, v, positions, bias_table)
    batch, heads, queries, dim = q.shape
    if height < 1 or width < 1 or dim < 1:
        raise ValueError(f"height, width and head dim must be at least 1, not {height}, {width} and {dim}")
    if k.shape[:2] != (batch, heads) or k.shape[3] != dim:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch, heads or head dim")
    if queries != height * width:
        raise ValueError(f"q has {queries} queries, but height*width is {height}*{width}={height * width}")
    if positions.dim() != 4 or positions.shape[0] != batch or tuple(positions.shape[2:]) != (k.shape[2], 2):
        raise ValueError(
            f"positions must be B x groups x Ns x 2 = {batch} x groups x {k.shape[2]} x 2, not {tuple(positions.shape)}"
        )
    if positions.shape[1] < 1 or heads % positions.shape[1]:
        raise ValueError(f"{heads} heads cannot be shared by {positions.shape[1]} groups")
    if k.shape[2] < 1:
        raise ValueError("there are no keys (Ns=0): softmax over nothing is undefined")
    if q.dtype != k.dtype or q.dtype != v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k, v must share one float dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    wanted = torch.float64 if q.dtype == torch.float64 else torch.float32
    if positions.dtype != wanted:
        raise ValueError(
            f"positions are {positions.dtype}; with q in {q.dtype} they must be {wanted}, which bf16 and fp16 cannot "
            "replace (they misplace keys by up to a fifth of a table cell)"
        )
    if bias_table is not None and (
        bias_table.dim() != 3
        or bias_table.shape[0] != heads
        or not bias_table.is_floating_point()
        or 0 in bias_table.shape
    ):
        raise ValueError(
            f"bias_table must be heads x Th x Tw with {heads} heads and no empty side, not {tuple(bias_table.shape)}"
        )
