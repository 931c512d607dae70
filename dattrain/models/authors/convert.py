"""A checkpoint of the authors' code (CVPR or DAT++) as a model of ours, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dattrain.errors import UserError
from dattrain.models.authors import architecture, architecture_datpp, names
from dattrain.models.authors import names_datpp as names_datpp  # registers the modules of DAT++
from dattrain.models.dat import DAT


def from_authors(state_dict: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> DAT:
    """Build the model that a checkpoint of the authors holds (CVPR code or DAT++), with its weights.

    Args:
        state_dict: their tensors by name, or a mapping that holds them under ``model``.
        config: their MODEL.DAT mapping; inferred from names and shapes when None.

    Returns:
        The model in evaluation mode, on the CPU, in the dtype of the tensors.

    Raises:
        UserError: tensors missing, left over or misshapen; a setting that is not built here.
    """
    state = tensors_of(state_dict)
    with torch.device("meta"):
        model = DAT(**_arguments(state, config))
    stated, model.window_size = model.windows(model.img_size), None
    if model.windows(model.img_size) != stated:
        model.window_size = tuple(stated)
    model.load_state_dict(names.read_all(state, model), strict=True, assign=True)
    return model.requires_grad_(True).eval()


def to_authors(model: DAT) -> dict[str, Tensor]:
    """The state dict that the authors' code loads strictly: their names, order, shapes and buffers; on the CPU.

    Raises:
        UserError: a tensor of ours has no counterpart there (a block or a setting of ours alone).
    """
    return names.write_all(model)


def our_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors under our names, whether ``state`` (or a mapping in it) holds them under ours or theirs.

    Raises:
        UserError: no tensors, or theirs of a model that is not built here.
    """
    tensors = tensors_of(state)
    if "patch_proj.0.weight" not in tensors:
        return tensors
    with torch.device("meta"):
        source = DAT(**_arguments(tensors, None))
    return names.read_all(tensors, source)


def tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by name, taken out of ``model`` or ``state_dict`` where a file holds them there.

    Raises:
        UserError: something else is among them.
    """
    for key in ("model", "state_dict"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange or not state:
        raise UserError(f"expected tensors by name; {names.some(strange)} is not a tensor")
    return dict(state)


def _arguments(state: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of ``DAT``."""
    code: Any
    code, name = (architecture_datpp, "DAT++") if architecture.is_datpp(state) else (architecture, "DAT")
    try:
        arguments: dict[str, Any] = code.from_tensors(state) if config is None else code.from_config(config)
    except UserError:
        raise
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        why = f"({type(error).__name__}: {error})"
        if config is not None:
            raise UserError(f"not a complete MODEL.DAT configuration of the authors {why}") from error
        raise UserError(
            f"not a checkpoint of the authors' {name} {why}; its {len(state)} tensors begin with {', '.join(list(state)[:3])}"
        ) from error
    try:
        arguments["in_chans"] = state["patch_proj.0.weight"].shape[1]
        arguments["num_classes"] = architecture.classes(state)
    except KeyError as error:
        raise UserError(f"not a checkpoint of the authors: {error} is missing") from error
    return arguments
