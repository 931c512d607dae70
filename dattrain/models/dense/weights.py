"""Weights into a model with a backbone: of a classification training, of the authors' files, or of a dense training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from dattrain.errors import UserError
from dattrain.models import surgery
from dattrain.models.authors.names import some
from dattrain.models.dat import DAT
from dattrain.models.dense import timm_networks
from dattrain.models.dense.backbone import Backbone

BODY, NORMS = "backbone.body.", "backbone.norms."


class Dense(Protocol):
    """A model of this package: ``backbone``, and heads beside it."""

    @property
    def backbone(self) -> Backbone:
        """What the tensors of a classification training go into."""

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers by name."""


@torch.no_grad()
def initialise(
    model: Dense,
    tensors: Mapping[str, Tensor],
    *,
    bias_table: surgery.BiasTable = "resize",
    keep_head: bool = False,
) -> surgery.LoadReport:
    """Load ``tensors`` into ``model``; nothing is written unless everything fits.

    Args:
        tensors: of a classification training or of the authors by our names (for timm's networks by timm's or their authors'): they go into the
            backbone, whose output norms and heads stay as drawn, while final norm and classifier are dropped. Or of a dense
            training, by its names (``backbone.body.*``).
        bias_table: how DAT's tables of another size are taken, see ``surgery.resize_for``.
        keep_head: of a dense training the heads are taken too, and must fit; otherwise the model's own stay as drawn.

    Returns:
        A report with every tensor of either side, by the model's names; those that are dropped by the source's.

    Raises:
        UserError: tensors of another network.
    """
    dense = any(name.startswith("backbone.") for name in tensors)
    body, beside = {}, {}
    for name, tensor in tensors.items():
        if not name.startswith(BODY) if dense else name.startswith(("norm.", "head.")):
            beside[name] = tensor
        else:
            body[name.removeprefix(BODY)] = tensor
    report = surgery.LoadReport()
    updates: list[tuple[Tensor, Tensor]] = []
    for name, own in model.state_dict().items():
        if name.startswith(BODY):
            continue
        source = beside.pop(name, None) if dense else None
        if source is not None and (keep_head or name.startswith(NORMS)):
            if source.shape != own.shape:
                raise UserError(
                    f"{name} is {tuple(source.shape)} in the source, {tuple(own.shape)} in the model; choose init.head=new"
                )
            updates.append((own, source))
            report.add(name, "kept")
        elif dense and keep_head and not name.startswith(NORMS):
            raise UserError(f"the source lacks {name}: its head is another; choose init.head=new")
        else:
            replaced = "" if source is None else f" in place of {_shape(source)}"
            report.add(name, "new", f"{_shape(own)}{replaced}")
    if keep_head and dense:
        left = [name for name in beside if not name.startswith(NORMS)]
        if left:
            raise UserError(
                f"the source has tensors that the model has no place for: {some(left)}; choose init.head=new"
            )
    for entry in _load_body(model.backbone.body, body, bias_table).entries:
        own_name = entry.name if entry.status == "dropped" else BODY + entry.name
        report.add(own_name, entry.status, entry.detail)
    for name, tensor in beside.items():
        report.add(name, "dropped", f"{_shape(tensor)}, the model has no such tensor")
    for own, source in updates:
        own.copy_(source)
    return report


def _load_body(
    body: nn.Module, tensors: Mapping[str, Tensor], bias_table: surgery.BiasTable
) -> surgery.LoadReport:
    if isinstance(body, DAT):
        return surgery.resize_for(body, tensors, bias_table=bias_table)
    own, report, found = body.state_dict(), surgery.LoadReport(), timm_networks.renamed(body, tensors)
    missing, left = [name for name in own if name not in found], [name for name in found if name not in own]
    if missing or left:
        raise UserError(
            f"not the weights of this backbone: they lack {some(missing)}, and have {some(left)} that it has no place for"
        )
    for name, parameter in own.items():
        if found[name].shape != parameter.shape:
            raise UserError(
                f"{name} is {tuple(found[name].shape)} in the source, {tuple(parameter.shape)} in the model"
            )
    for name, parameter in own.items():
        parameter.copy_(found[name])
        report.add(name, "kept")
    for name in tensors:
        if name.endswith(timm_networks.BUFFERS):
            report.add(name, "dropped", "computed from the size")
    return report


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"
