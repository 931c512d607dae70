"""Weights into a model of another resolution or with another head. Every tensor is accounted for.

The authors' checkpoints are read and written in ``authors.convert``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dattrain.errors import UserError
from dattrain.models.authors import convert
from dattrain.models.authors.names import some
from dattrain.models.dat import DAT
from dattrain.models.deformable import DeformableAttention
from dattrain.models.resize import resize_fixed_table, resize_table

Status = Literal["kept", "resized", "new", "dropped"]
Head = Literal["keep", "new", "map"]
BiasTable = Literal["resize", "sample"]

HEAD = ("head.fc.weight", "head.fc.bias")


@dataclass(frozen=True)
class TensorStatus:
    """What became of one tensor; ``detail`` says from what, or why."""

    name: str
    status: Status
    detail: str = ""


@dataclass
class LoadReport:
    """What became of every tensor of the source and of the model, each name once."""

    entries: list[TensorStatus] = field(default_factory=list)

    def add(self, name: str, status: Status, detail: str = "") -> None:
        """Append one tensor."""
        self.entries.append(TensorStatus(name, status, detail))

    def relabel(self, name: str, status: Status, detail: str) -> None:
        """Say something else of a tensor that is there."""
        self.entries = [
            TensorStatus(name, status, detail) if entry.name == name else entry for entry in self.entries
        ]

    def names(self, status: Status) -> list[str]:
        """Names of the tensors with this status."""
        return [entry.name for entry in self.entries if entry.status == status]

    def __str__(self) -> str:
        """A line of counts, then one line per tensor that was not simply kept."""
        counts = ", ".join(f"{len(self.names(status))} {status}" for status in get_args(Status))
        notable = [entry for entry in self.entries if entry.status != "kept" or entry.detail]
        width = max((len(entry.name) for entry in notable), default=0)
        return "\n".join(
            [f"{len(self.entries)} tensors: {counts}"]
            + [f"  {entry.status:8} {entry.name:{width}}  {entry.detail}".rstrip() for entry in notable]
        )


def checkpoint_filter_fn(state: Mapping[str, Any], model: DAT) -> dict[str, Tensor]:
    """Tensors of ours or of the authors, with tables at ``model``'s size: what timm filters pretrained weights by.

    With another head, or for features, timm leaves what has no counterpart as it was drawn, so that it is refused here.

    Raises:
        UserError: tensors of another network: some beside the head are missing, or have no place.
    """
    tensors = convert.our_tensors(state)
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    lacking = [name for name in sizes if name not in tensors and name not in HEAD]
    left = [name for name in tensors if name not in sizes and name not in HEAD]
    if lacking or left:
        raise UserError(
            f"not the weights of this model: they lack {some(lacking)}, and have {some(left)} that it has no place for"
        )
    positions = _deformable_tables(model)
    return {
        name: _resized(name, tensor, sizes[name], positions.get(name))
        if "bias_table" in name and name in sizes
        else tensor
        for name, tensor in tensors.items()
    }


@torch.no_grad()
def resize_for(
    model: DAT,
    tensors: Mapping[str, Tensor],
    *,
    bias_table: BiasTable = "resize",
    head: Head = "keep",
    class_map: Sequence[int] | Any | None = None,
) -> LoadReport:
    """Load weights of the same architecture at another resolution, or with another head, into ``model``.

    Window tables are resized bicubically, since the window itself changes. Offsets need nothing: their range is stated
    relative to the map.

    Args:
        tensors: by our names.
        bias_table: deformable tables of another size are resized bicubically (``resize``), or kept as they are and read at
            the new map's displacements (``sample``): the model's parameters then take the source's shapes.
        head: ``keep`` needs the same classes; ``new`` leaves the model's own draw; ``map`` picks rows by ``class_map``.
        class_map: for ``map``: the source class of each of the model's classes, -1 where there is none. Such rows stay
            as the model drew them.

    Returns:
        A report with every tensor of either side.

    Raises:
        UserError: a tensor that fits nowhere, one that is missing, or a class map that does not fit.
    """
    for name, choice, literal in (("bias_table", bias_table, BiasTable), ("head", head, Head)):
        if choice not in get_args(literal):
            raise UserError(
                f"init.{name}={choice!r} is not known; choose one of {', '.join(get_args(literal))}"
            )
    report, left = LoadReport(), dict(tensors)
    positions = _deformable_tables(model)
    updates: list[tuple[nn.Parameter, Tensor]] = []
    adopted: list[tuple[DeformableAttention, Tensor]] = []
    missing = []
    for name, parameter in model.named_parameters():
        if name in HEAD and head != "keep":
            continue
        if name not in left:
            missing.append(name)
            continue
        source, module = left.pop(name), positions.get(name)
        if source.shape == parameter.shape:
            updates.append((parameter, source))
            report.add(name, "kept")
        elif "bias_table" not in name:
            hint = "; choose init.head=new or map" if name in HEAD else ""
            raise UserError(f"{name} is {_sizes(source, parameter)}{hint}")
        elif source.dim() != 3 or source.shape[0] != parameter.shape[0]:
            raise UserError(f"{name} is {_sizes(source, parameter)}: other heads")
        elif bias_table == "sample" and module and module.conventions.position == "relative":
            adopted.append((module, source))
            report.add(name, "kept", f"{_shape(source)}, read at the displacements of {_shape(parameter)}")
        else:
            updates.append((parameter, _resized(name, source, parameter.shape, module)))
            report.add(name, "resized", f"{_shape(source)} -> {_shape(parameter)}, bicubic")
    if missing:
        raise UserError(f"the source lacks {some(missing)}")
    if head == "new":
        _new_head(model, left, report)
    elif head == "map":
        updates += _mapped_head(model, left, class_map, report)
    if left:
        raise UserError(f"the source has tensors that the model has no place for: {some(left)}")
    # Nothing is written before everything has been found to fit.
    for parameter, value in updates:
        parameter.copy_(value)
    for module, table in adopted:
        _adopt(module, table)
    return report


def adopt_tables(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Give deformable tables the shapes that they have in a checkpoint (after ``bias_table="sample"``), values undefined.

    Args:
        shapes: of parameters by our names; others than deformable tables are skipped.
    """
    for name, module in _deformable_tables(model).items():
        table = module.bias_table
        assert table is not None
        if name in shapes and tuple(shapes[name]) != tuple(table.shape):
            _adopt(module, table.detach().new_zeros(tuple(shapes[name])))


def _new_head(model: DAT, left: dict[str, Tensor], report: LoadReport) -> None:
    parameters = _head(model)
    for name in HEAD:
        source = left.pop(name, None)
        if name in parameters:
            replaced = "" if source is None else f" in place of {_shape(source)}"
            report.add(name, "new", f"{_shape(parameters[name])}, drawn as init={model.init}{replaced}")
        elif source is not None:
            report.add(name, "dropped", f"{_shape(source)}, the model has no head")


def _mapped_head(
    model: DAT, left: dict[str, Tensor], class_map: Any, report: LoadReport
) -> list[tuple[nn.Parameter, Tensor]]:
    parameters = _head(model)
    sources = {name: left.pop(name) for name in HEAD if name in left}
    if not parameters or set(sources) != set(parameters):
        raise UserError("init.head=map needs a head in the source and in the model")
    index = _checked_map(class_map, model.num_classes, len(sources[HEAD[0]]))
    matched = index >= 0
    fresh = [int(row) for row in (~matched).nonzero().flatten()]
    updates = []
    for name, parameter in parameters.items():
        source = sources[name]
        if source.shape[1:] != parameter.shape[1:]:
            raise UserError(f"{name} is {_sizes(source, parameter)}")
        picked = source.to(parameter)[index.clamp(min=0).to(parameter.device)]
        keep = matched.to(parameter.device).view(-1, *[1] * (parameter.dim() - 1))
        updates.append((parameter, torch.where(keep, picked, parameter)))
        report.add(
            name, "kept", f"{int(matched.sum())} of {len(index)} rows picked out of {len(source)} classes"
        )
        if fresh:
            report.add(
                f"{name}[{some(fresh)}]", "new", f"no counterpart in the source; drawn as init={model.init}"
            )
    return updates


def _head(model: DAT) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if name in HEAD}


def _checked_map(class_map: Any, classes: int, source_classes: int) -> Tensor:
    if class_map is None:
        raise UserError("init.head=map needs a map from the model's classes to the source's")
    index = torch.as_tensor(class_map)
    if index.is_floating_point() or index.dim() != 1 or len(index) != classes:
        raise UserError(
            f"the class map is {index.dtype} of shape {tuple(index.shape)}, not {classes} integers"
        )
    index = index.long()
    if classes and (int(index.max()) >= source_classes or int(index.min()) < -1):
        raise UserError(
            f"the class map goes from {int(index.min())} to {int(index.max())}, outside -1 ... {source_classes - 1}"
        )
    return index


def _deformable_tables(model: nn.Module) -> dict[str, DeformableAttention]:
    return {
        f"{name}.bias_table": module
        for name, module in model.named_modules()
        if isinstance(module, DeformableAttention) and module.bias_table is not None
    }


def _adopt(module: DeformableAttention, table: Tensor) -> None:
    old = module.bias_table
    assert old is not None
    module.bias_table = nn.Parameter(table.detach().to(old).clone(), requires_grad=old.requires_grad)
    module.size = ((table.shape[1] + 1) // 2, (table.shape[2] + 1) // 2)


def _resized(name: str, source: Tensor, shape: torch.Size, module: DeformableAttention | None) -> Tensor:
    if module is None or module.conventions.position != "fixed":
        return resize_table(source, (shape[1], shape[2]))
    side = isqrt(source.shape[1])
    old = module.map_sizes((side, side))
    if (side * side, old[2] * old[3]) != tuple(source.shape[1:]):
        raise UserError(
            f"{name}: a fixed table of {tuple(source.shape)} is not of a square map, and cannot be resized"
        )
    return resize_fixed_table(source, old, module.map_sizes(module.size))


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def _sizes(source: Tensor, parameter: Tensor) -> str:
    return f"{tuple(source.shape)} in the source, {tuple(parameter.shape)} in the model"
