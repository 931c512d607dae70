"""Read DeepSpeed's own checkpoints, of every ZeRO stage, into the pieces of ours.

Its files are pickles. They are read with torch's weights-only reader and a list of DeepSpeed's few plain classes, which
runs no code from the file; only with ``trust`` are they unpickled. Layouts are those of DeepSpeed 0.19.8
(``zero_to_fp32.py`` and ``ds_to_universal.py`` are its own documentation of them).
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dattrain.errors import UserError
from dattrain.state.convert.offline import Source, first_line, untrusted
from dattrain.state.dtypes import DTYPE_NAMES
from dattrain.state.format.manifest import Parameter
from dattrain.state.format.rank_file import Piece
from dattrain.state.partition import MOMENTS, scaler_state

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


def read(folder: Path, *, tag: str | None = None, trust: bool = False) -> Source:
    """Open the checkpoint in ``folder`` (what ``engine.save_checkpoint`` was given), of ``tag`` or the latest.

    Args:
        folder: holds ``latest`` and a folder per tag, or is itself the folder of a tag.
        trust: unpickle what the weights-only reader refuses; that can run any code that the file's writer liked.

    Raises:
        UserError: it is not one, is incomplete, needs ``trust``, or is of a kind that is not known.
    """
    where = _tag_folder(folder, tag)
    models = _files(where, _MODEL)
    optimizers = _files(where, _OPTIMIZER)
    if not models:
        raise UserError(f"{where} holds no *_model_states.pt: it is no DeepSpeed checkpoint")
    load = partial(_load, trust=trust)
    head = load(models[0])
    world = int(head["dp_world_size"])
    stage = _stage(where, models, optimizers, world, load)
    # "module" holds parameters and persistent buffers in the module's order.
    named = {_clean(n): t for n, t in head["module"].items()}
    buffers = tuple(_clean(n) for n in head.get("buffer_names") or () if _clean(n) in named)
    shapes = {n: tuple(t.shape) for n, t in named.items() if n not in buffers}
    if stage == 3:
        shapes.update(_flat_shapes(head["param_shapes"]))
        shapes.update({_clean(n): tuple(s) for n, s in (head.get("frozen_param_shapes") or {}).items()})
    source = Source(
        stage=stage,
        step=int(head["global_steps"]),
        samples=int(head.get("global_samples") or 0),
        parameters={},
        buffers=buffers,
        engine={
            "global_steps": int(head["global_steps"]),
            "global_samples": int(head.get("global_samples") or 0),
            "skipped_steps": int(head["skipped_steps"]),
            "loss_scaler": None,
        },
        parts=[],
    )
    full = {n: named[n] for n in buffers}
    if stage == 0:
        opt_steps = _read_replicated(source, head, shapes, full)
    elif stage == 3:
        opt_steps = _read_by_parameter(source, head, models, optimizers, world, full, load)
    else:
        frozen = {_clean(n): t for n, t in (head.get("frozen_param_fragments") or {}).items()}
        opt_steps = _read_by_group(source, optimizers, shapes, {**full, **frozen}, load)
    source.parameters = {n: Parameter(s, n in opt_steps, opt_steps.get(n)) for n, s in shapes.items()}
    return source


# Finding files


def _tag_folder(folder: Path, tag: str | None) -> Path:
    if tag is None and _files(folder, _MODEL):
        return folder
    if tag is None:
        latest = folder / "latest"
        if not latest.is_file():
            raise UserError(
                f"{folder} holds neither a file 'latest' nor *_model_states.pt; name the tag with --tag"
            )
        tag = latest.read_text().strip()
    if tag in ("", ".", "..") or "/" in tag or not (folder / tag).is_dir():
        raise UserError(f"{folder} has no tag {tag!r}")
    return folder / tag


def _files(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if match:
            if int(match[2]) != 0:
                raise UserError(f"{path}: checkpoints of tensor or pipeline parallel models cannot be read")
            found.append((int(match[1] or 0), path))
    return [path for _, path in sorted(found)]


def _stage(
    folder: Path, models: list[Path], optimizers: list[Path], world: int, load: Callable[[Path], Any]
) -> int:
    if not optimizers:
        return 0
    if len(optimizers) != world:
        raise UserError(
            f"{folder} was saved by {world} ranks and holds the optimizer states of {len(optimizers)}"
        )
    state = load(optimizers[0])["optimizer_state_dict"]
    if isinstance(state.get("base_optimizer_state"), list):
        raise UserError(
            f"{optimizers[0]}: elastic_checkpoint layouts cannot be read; save with DeepSpeed's default"
        )
    stage = int(state["zero_stage"]) if "zero_stage" in state else 1
    if stage == 3 and len(models) != world:
        raise UserError(f"{folder} was saved by {world} ranks and holds the model states of {len(models)}")
    return stage


def _load(path: Path, *, trust: bool) -> Any:
    try:
        if trust:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        with torch.serialization.safe_globals(_plain_classes()):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as e:
        raise UserError(untrusted(path, first_line(e))) from e
    except (RuntimeError, OSError, EOFError, ValueError, AttributeError, ImportError, KeyError) as e:
        raise UserError(f"{path}: cannot be read ({type(e).__name__}: {first_line(e)})") from e


def _plain_classes() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def _clean(name: str) -> str:
    return name.removeprefix("module.").replace("_orig_mod.", "")


def _flat_shapes(groups: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
    return {_clean(n): tuple(s) for group in groups for n, s in group.items()}


# Reading tensors, by ZeRO stage


def _pieces(state: str, name: str, start: int, values: Tensor) -> dict[Piece, Tensor]:
    flat = values.detach().reshape(-1).to(torch.float32)
    return {Piece(state, name, start, flat.numel()): flat} if flat.numel() else {}


def _pieces_of(tensors: Mapping[str, Tensor], buffers: Sequence[str]) -> dict[Piece, Tensor]:
    found: dict[Piece, Tensor] = {}
    for name, tensor in tensors.items():
        if name in buffers:
            found[
                Piece("buffer", name, 0, tensor.numel(), DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            ] = tensor
        else:
            found.update(_pieces("param", name, 0, tensor))
    return found


def _moments(state: Mapping[str, Any] | None, offset: int, numel: int) -> Iterator[tuple[str, Tensor]]:
    for moment in MOMENTS:
        value = None if state is None else state.get(moment)
        yield moment, torch.zeros(numel) if value is None else value.reshape(-1).narrow(0, offset, numel)


def _read_by_group(
    source: Source,
    files: list[Path],
    shapes: Mapping[str, tuple[int, ...]],
    full: dict[str, Tensor],
    load: Callable[[Path], Any],
) -> dict[str, int]:
    """Stages 1 and 2: every group is flattened, cut, and each rank's cut says which parameter lies where."""
    opt_steps: dict[str, int] = {}
    starts: list[dict[str, int]] = []
    reached: dict[str, int] = {}
    for path in files:
        file = load(path)
        if (file.get("ds_config") or {}).get("zero_optimization", {}).get("round_robin_gradients"):
            raise UserError(
                f"{path}: saved with round_robin_gradients, where DeepSpeed records wrong places; it cannot be read"
            )
        state = file["optimizer_state_dict"]
        here: dict[str, int] = {}
        for group, mapping in enumerate(state["param_slice_mappings"]):
            adam = state["base_optimizer_state"]["state"].get(group) or {}
            for name, address in mapping.items():
                here[_clean(name)] = reached.get(_clean(name), 0)
                reached[_clean(name)] = here[_clean(name)] + int(address.numel)
                opt_steps[_clean(name)] = int(adam.get("step", 0))
        starts.append(here)
        source.engine["loss_scaler"] = scaler_state(state.get("loss_scaler"))
        source.groups = source.groups or _hyperparameters(state["base_optimizer_state"]["param_groups"])
    for name, count in reached.items():
        if count != math.prod(shapes[name]):
            raise UserError(
                f"{files[0].parent}: {name} has {math.prod(shapes[name])} elements, of which {count} are there"
            )

    def part(rank: int) -> dict[Piece, Tensor]:
        state = load(files[rank])["optimizer_state_dict"]
        found = _pieces_of(full, source.buffers) if rank == 0 else {}
        for group, mapping in enumerate(state["param_slice_mappings"]):
            adam = state["base_optimizer_state"]["state"].get(group)
            master = state["single_partition_of_fp32_groups"][group]
            for name, address in mapping.items():
                start = starts[rank][_clean(name)]
                found.update(
                    _pieces("param", _clean(name), start, master.narrow(0, address.start, address.numel))
                )
                for moment, values in _moments(adam, address.start, address.numel):
                    found.update(_pieces(moment, _clean(name), start, values))
        return found

    source.parts = [partial(part, rank) for rank in range(len(files))]
    return opt_steps


def _read_by_parameter(
    source: Source,
    head: Mapping[str, Any],
    models: list[Path],
    files: list[Path],
    world: int,
    full: dict[str, Tensor],
    load: Callable[[Path], Any],
) -> dict[str, int]:
    """Stage 3: every parameter is padded to the ranks and cut; sub-groups lie one after another."""
    first = load(files[0])["optimizer_state_dict"]
    opt_steps = {}
    for group, shapes in enumerate(head["param_shapes"]):
        adam = first["optimizer_state_dict"]["state"].get(group) or {}
        for name in shapes:
            opt_steps[_clean(name)] = int(adam.get("step", 0))
    source.engine["loss_scaler"] = scaler_state(first.get("loss_scaler"))
    source.groups = _hyperparameters(first["optimizer_state_dict"]["param_groups"])

    def part(rank: int) -> dict[Piece, Tensor]:
        state = load(files[rank])["optimizer_state_dict"]
        found = _pieces_of(full, source.buffers) if rank == 0 else {}
        for group, shapes in enumerate(head["param_shapes"]):
            adam = state["optimizer_state_dict"]["state"].get(group)
            offset = 0
            for name, shape in shapes.items():
                total = math.prod(shape)
                size = -(-total // world)
                numel = max(0, min(size, total - size * rank))
                master = state["fp32_flat_groups"][group].narrow(0, offset, numel)
                found.update(_pieces("param", _clean(name), size * rank, master))
                for moment, values in _moments(adam, offset, numel):
                    found.update(_pieces(moment, _clean(name), size * rank, values))
                offset += size
        own = load(models[rank])
        for name, fragment in (own.get("frozen_param_fragments") or {}).items():
            total, size = math.prod(head["frozen_param_shapes"][name]), fragment.numel()
            numel = max(0, min(size, total - size * rank))
            found.update(
                _pieces("param", _clean(name), size * rank, fragment.reshape(-1).narrow(0, 0, numel))
            )
        return found

    source.parts = [partial(part, rank) for rank in range(world)]
    return opt_steps


def _read_replicated(
    source: Source, head: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], full: dict[str, Tensor]
) -> dict[str, int]:
    """Stage 0: one file with the full model, and the optimizer's state by number."""
    optimizer = head.get("optimizer")
    if not optimizer:
        raise UserError(
            "the checkpoint holds no optimizer state: its weights alone can serve as init.from, by `dattrain import`"
        )
    source.groups = _hyperparameters(optimizer["param_groups"])
    numbered = [[optimizer["state"].get(i) for i in group["params"]] for group in optimizer["param_groups"]]
    names = name_states(
        shapes, [[None if s is None else tuple(s["exp_avg"].shape) for s in group] for group in numbered]
    )
    states = {n: s for group, members in zip(numbered, names) for s, n in zip(group, members)}
    module = {_clean(n): t for n, t in head["module"].items()}

    def part() -> dict[Piece, Tensor]:
        found = _pieces_of({**{n: module[n] for n in shapes}, **full}, source.buffers)
        for name, state in states.items():
            for moment, values in _moments(state, 0, math.prod(shapes[name])):
                found.update(_pieces(moment, name, 0, values))
        return found

    source.parts = [part]
    return {n: int(s["step"]) if s else 0 for n, s in states.items()}


def name_states(
    shapes: Mapping[str, tuple[int, ...]], groups: Sequence[Sequence[tuple[int, ...] | None]]
) -> list[list[str]]:
    """Names of the numbered states of an unsharded optimizer, which keeps no names.

    Every group holds its parameters in the model's order, as filters over ``named_parameters()`` leave them; a parameter
    is in one group, or (frozen) in none. If exactly one assignment fits all shapes, it is returned.

    Args:
        shapes: of every parameter, in the model's order.
        groups: shapes of every group's states in order; None where there is no state yet.

    Raises:
        UserError: no assignment fits, or several do.
    """
    listed = list(shapes.items())
    total = sum(len(g) for g in groups)
    # How far each group has been consumed -> (number of ways to get there, capped at 2; the last step of one of them).
    layers: list[dict[tuple[int, ...], tuple[int, tuple[int, ...] | None, int]]] = [
        {(0,) * len(groups): (1, None, -1)}
    ]
    for _, shape in listed:
        reached: dict[tuple[int, ...], tuple[int, tuple[int, ...] | None, int]] = {}
        for at, (ways, _, _) in layers[-1].items():
            steps = [(at, -1)] if total < len(listed) else []
            for g, group in enumerate(groups):
                if at[g] < len(group) and group[at[g]] in (None, shape):
                    steps.append(((*at[:g], at[g] + 1, *at[g + 1 :]), g))
            for to, g in steps:
                old = reached.get(to)
                reached[to] = (ways, at, g) if old is None else (min(2, old[0] + ways), old[1], old[2])
        layers.append(reached)
    end = tuple(len(g) for g in groups)
    ways = layers[-1].get(end, (0, None, -1))[0]
    if ways != 1:
        what = (
            "do not fit the model's parameters" if ways == 0 else "fit the model's parameters in several ways"
        )
        raise UserError(
            f"the optimizer's states are numbered, not named, and {what}; save with ZeRO stage 1-3 instead"
        )
    names: list[list[str]] = [[] for _ in groups]
    at = end
    for (name, _), layer in zip(reversed(listed), reversed(layers[1:])):
        _, before, g = layer[at]
        if g >= 0:
            names[g].insert(0, name)
        assert before is not None
        at = before
    return names


def _hyperparameters(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    kept = ("lr", "weight_decay", "betas", "eps", "name")
    return [{k: list(g[k]) if isinstance(g[k], tuple) else g[k] for k in kept if k in g} for g in groups]
