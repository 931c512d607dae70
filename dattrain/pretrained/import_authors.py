"""Weights that the authors released, DAT (CVPR 2022) and DAT++, as a model of ours.

Nothing in the file is executed: ``torch.load`` with ``weights_only``, or safetensors. Their checkpoints also hold their
configuration as a ``yacs`` object, which plain safe loading refuses; here it is read as the dictionary that it is. Other
harmless objects that trainers put beside the tensors (numpy's numbers, parsed arguments) are skipped unread.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dattrain.data.labels import infer
from dattrain.errors import UserError
from dattrain.models.authors.convert import from_authors, to_authors
from dattrain.models.dat import DAT
from dattrain.pretrained.pretrained_cfg import PretrainedCfg, cfg_of_model

_STATES = ("model", "state_dict", "module", "model_ema", "state_dict_ema", "ema")
"""Where trainers keep tensors in a checkpoint: the first that is there is taken, so averaged weights only where they are alone."""
_FIRST = "patch_proj.0.weight"
"""The authors' name of the first tensor of every DAT; what stands before it is a wrapper's prefix."""
_IGNORED = (
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "argparse.Namespace",
)


class _Ignored:
    """Stands for an object in a checkpoint that nobody needs; made from whatever its own class would be."""

    def __new__(cls, *args: object, **kwargs: object) -> _Ignored:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def read(file: Path, config_file: Path | None = None) -> tuple[DAT, PretrainedCfg, str]:
    """The model in a file of the authors, its pretrained config, and where its architecture and its tensors were read from.

    A file without classification head (a detector's backbone) gives a model without one.

    Raises:
        UserError: not such a file, or one whose model is not built here.
    """
    state, own, notes = load(file)
    config, origin = own, f"from the configuration in {file.name}"
    if config_file is not None:
        config, origin = read_config(config_file), f"from {config_file}"
    elif own is None:
        origin = "inferred from names and shapes"
    beside = _config_beside(file) if config is None else None
    state, more = _with_last_norm(state)
    notes += more
    try:
        model = from_authors(state, config)
    except UserError as error:
        if beside is None:
            raise
        raise UserError(f"{error}; if {beside} is its own: --config {beside}") from error
    if beside is not None:
        notes.append(f"{beside} is not read without --config")
    check_round_trip(model, state)
    cfg = cfg_of_model(
        model,
        resize="squash",
        labels=infer(model.num_classes),
        source=f"the authors' {file.name}",
    )
    return model, cfg, "; ".join([origin, *notes])


def load(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None, list[str]]:
    """Tensors by the authors' names, their MODEL.DAT mapping where the file has it, and what was done to get there.

    Raises:
        UserError: no such file, one that cannot be read safely, or one without tensors.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    with open(file, "rb") as opened:
        head = opened.read(9)
    if head[8:] == b"{":  # safetensors: eight bytes of length, then JSON
        try:
            tensors, notes = _own_names(load_file(file), file)
            return tensors, None, notes
        except SafetensorError as error:
            raise UserError(f"{file}: not a complete safetensors file ({error})") from None
    if not head.startswith((b"PK", b"\x80")):  # what torch.save writes: a zip file, and formerly a pickle
        hint = "; the authors' configuration goes with --config" if file.suffix in (".yaml", ".yml") else ""
        raise UserError(f"{file}: is no .pth and no .safetensors file, it begins with {head!r}{hint}")
    try:
        harmless = [(_Ignored, name) for name in _IGNORED]
        allowed: list[Any] = [(OrderedDict, "yacs.config.CfgNode"), _Ignored, *harmless]
        with torch.serialization.safe_globals(allowed):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # torch raises UnpicklingError, RuntimeError, EOFError, ... by where the file is damaged
        found = re.search(r"[^\n]*GLOBAL \S+[^.\n]*|WeightsUnpickler error:\s*.+", str(error))
        reason = found[0] if found else (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{file}: cannot be read safely: {reason}. Only tensors, containers and the authors' configuration are read; "
            "a file with other objects must be saved again with its tensors alone, by someone who trusts it"
        ) from None
    if not isinstance(content, Mapping):
        raise UserError(f"{file}: holds a {type(content).__name__}, not a checkpoint")
    state, path = content, []
    while key := next((k for k in _STATES if isinstance(state.get(k), Mapping)), None):
        state = state[key]
        path.append(key)
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise UserError(
            f"{file}: holds no tensors under 'model' (its keys: {', '.join(map(str, list(content)[:5]))})"
        )
    tensors, notes = _own_names(tensors, file)
    if path and path[-1] != "model":
        notes.insert(0, f"tensors of {path[-1]!r}")
    return tensors, _model_dat(content.get("config")), notes


def _own_names(state: dict[str, Tensor], file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The model's tensors under their own names, with a note of what was taken away.

    That is what wrappers put before the names (``module.``, ``_orig_mod.``, a detector's ``backbone.``), and tensors beside
    the model. Raises UserError where there are two models.
    """
    found = [name.removesuffix(_FIRST) for name in state if name.endswith(_FIRST)]
    if len(found) > 1:
        raise UserError(
            f"{file}: holds {len(found)} models, named {', '.join(found)}; save one of them alone"
        )
    if not found or not found[0]:
        return state, []
    (prefix,) = found
    inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    notes = [f"names without {prefix!r}"]
    if beside := [name for name in state if not name.startswith(prefix)]:
        parts = ", ".join(sorted({name.partition(".")[0] for name in beside}))
        notes.append(f"left out {len(beside)} tensors beside it ({parts})")
    return inside, notes


def _with_last_norm(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A detector's backbone has a norm per output (``norms.N``) in place of the last one; our model begins with a fresh one."""
    stages = [name for name in state if re.fullmatch(r"stages\.\d+\.layer_norms\.0\.norm\.weight", name)]
    if not stages or "cls_head.weight" in state or "cls_norm.norm.weight" in state:
        return state, []
    width = state[max(stages)]
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("norms.")}
    kept |= {"cls_norm.norm.weight": torch.ones_like(width), "cls_norm.norm.bias": torch.zeros_like(width)}
    return kept, [
        "the last norm is fresh" + (", those of outputs are left out" if len(kept) - 2 < len(state) else "")
    ]


def read_config(file: Path) -> dict[str, Any]:
    """MODEL.DAT of a YAML of the authors, or the file itself where it is that mapping. Raises UserError."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as YAML ({error})") from None
    found = _model_dat(content)
    if found is None and isinstance(content, dict) and "stage_spec" in content:
        return content
    if found is None:
        raise UserError(f"{file}: has no MODEL.DAT mapping with stage_spec")
    return found


def _config_beside(file: Path) -> Path | None:
    """A YAML of the same stem, as ``export --to authors`` writes it: named, never taken unasked."""
    found = (file.with_suffix(suffix) for suffix in (".yaml", ".yml"))
    return next((each for each in found if each.is_file()), None)


def check_round_trip(model: DAT, state: Mapping[str, Tensor]) -> None:
    """Compare what ``to_authors`` makes of the model with the file.

    Raises:
        UserError: at the first difference, and where weights are not finite.
    """
    back = to_authors(model)
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"{name} holds numbers that are not finite: the training that wrote it had diverged"
            )
        if name not in back or not torch.equal(back[name], tensor):
            raise UserError(
                f"{name} does not survive the way through our names and back: please report this file"
            )


def _model_dat(config: Any) -> dict[str, Any] | None:
    for key in ("MODEL", "DAT"):
        config = config.get(key) if isinstance(config, Mapping) else None
    return dict(config) if isinstance(config, Mapping) and "stage_spec" in config else None
