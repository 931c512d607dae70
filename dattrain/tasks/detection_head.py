"""Rows of a detector's heads that are a class's, in weights of another training: what ``init.head`` may keep and how it maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dattrain.models.dense.detector import Detector
from dattrain.models.dense.rcnn import BoxHead, MaskHead
from dattrain.models.dense.retina import RetinaHead

_BACKBONE = "backbone."


class Rows(NamedTuple):
    """How a parameter's first dimension is laid out: ``before`` x (classes + ``more``) x ``each``."""

    before: int
    more: int
    """1 where the background comes last."""
    each: int


def fits(model: Detector, tensors: Mapping[str, Tensor]) -> bool:
    """Whether ``tensors`` have pyramid and heads of the same detector, be it of other classes."""
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(_BACKBONE)}
    if {name for name in tensors if not name.startswith(_BACKBONE)} != own.keys():
        return False
    rows = class_rows(model)
    return all(
        tensors[name].shape[1:] == tensor.shape[1:] if name in rows else tensors[name].shape == tensor.shape
        for name, tensor in own.items()
    )


def class_count(model: Detector, tensors: Mapping[str, Tensor]) -> int:
    """Classes of weights that ``fits`` accepts."""
    name, rows = next(iter(class_rows(model).items()))
    return len(tensors[name]) // rows.before // rows.each - rows.more


def mapped(model: Detector, tensors: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """``tensors`` with the rows of classes picked; those of the background are kept.

    Args:
        tensors: that ``fits`` accepts.
        index: where each of the model's classes is among the source's; below 0 it keeps the model's own draw.
    """
    found, count = dict(tensors), class_count(model, tensors)
    parameters = dict(model.named_parameters())
    for name, rows in class_rows(model).items():
        own = parameters[name].detach().cpu()
        rest = own.shape[1:]
        new = own.view(rows.before, -1, rows.each, *rest).clone()
        old = tensors[name].cpu().to(own.dtype).view(rows.before, count + rows.more, rows.each, *rest)
        there = torch.nonzero(index >= 0)[:, 0]
        new[:, there] = old[:, index[there]]
        if rows.more:
            new[:, -rows.more :] = old[:, -rows.more :]
        found[name] = new.view_as(own)
    return found


def class_rows(model: Detector) -> dict[str, Rows]:
    """The parameters that have rows of classes, by name."""
    return {
        f"{path}.{layer}.{name}": rows
        for path, module in model.named_modules()
        for layer, rows in _layers(module)
        for name, _ in getattr(module, layer).named_parameters()
    }


def _layers(module: nn.Module) -> Iterator[tuple[str, Rows]]:
    if isinstance(module, RetinaHead):
        yield "classes", Rows(module.anchors, 0, 1)
    elif isinstance(module, BoxHead):
        yield "classes", Rows(1, 1, 1)
        yield "boxes", Rows(1, 0, 4)
    elif isinstance(module, MaskHead):
        yield "masks", Rows(1, 0, 1)
