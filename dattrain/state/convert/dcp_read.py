"""Read checkpoints of torch.distributed.checkpoint (DCP), as FSDP, torchtitan and we write them, into the pieces of ours."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dattrain.errors import UserError
from dattrain.state.convert import dcp_store
from dattrain.state.convert.dcp_store import Store
from dattrain.state.convert.deepspeed_read import name_states
from dattrain.state.convert.offline import Source
from dattrain.state.dtypes import DTYPE_NAMES
from dattrain.state.format.manifest import Parameter
from dattrain.state.format.rank_file import Piece
from dattrain.state.partition import MOMENTS

PART = 1 << 28
"""Elements that a rank file of the import may hold before the next one is begun: 1 GiB."""
_WRAPPERS = re.compile(r"(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_EMA = re.compile(r"(?:^|[._])ema(?:[._]|$)")
_SETTINGS = ("lr", "weight_decay", "betas", "eps", "name")


def read(
    folder: Path,
    parameters: Sequence[str],
    buffers: Sequence[str] = (),
    *,
    tag: str | None = None,
    trust: bool = False,
) -> Source:
    """Open the checkpoint in ``folder`` for a model of these names.

    Names may stand behind any prefix (``model.``, ``app.model.``, none) and hold the wrappers of ``torch.compile``,
    activation checkpointing and FSDP 1. Adam's states are found by name, or, of an optimizer that keeps numbers, by shape.
    Without any the moments are zeros, as at a start. Tensors of 16 bits become fp32.

    Args:
        folder: a DCP checkpoint, or holds torchtitan's ``step-N``.
        parameters: in the model's order.
        buffers: persistent ones.
        tag: of which folder in ``folder``.
        trust: unpickle what is refused otherwise; that can run any code that the file's writer liked.

    Raises:
        UserError: it is none, is incomplete, needs ``trust``, is of another model or optimizer.
    """
    place = dcp_store.find(folder, tag)
    if place is None:
        what = "" if tag is None else f" in {tag!r}"
        raise UserError(
            f"{folder} holds no checkpoint of torch.distributed.checkpoint{what}: there is no {dcp_store.METADATA}"
        )
    store = dcp_store.open_store(place, trust=trust)
    keys = _keys(store)
    prefix, average = _prefixes(store, keys, {*parameters, *buffers})
    weights = _under(store, keys, prefix, parameters)
    # What the checkpoint has and the model has not is listed by whoever compares the two.
    names = [n for n in parameters if n in weights]
    names += [n for n in weights if n not in {*parameters, *buffers}]
    shapes = {n: store.shape(weights[n]) for n in names}
    adam = _adam(store, keys, shapes)
    averages = {} if average is None else _under(store, keys, average, parameters)
    ours = _ours(store)
    progress = _progress(store)
    source = Source(
        stage=ours["stage"],
        step=progress.get("step", max((s.step for s in adam.states.values()), default=0)),
        samples=progress.get("samples_seen"),
        parameters={n: _parameter(n, s, adam) for n, s in shapes.items()},
        buffers=tuple(n for n in buffers if n in weights),
        engine=ours["engine"],
        parts=[],
        groups=adam.groups,
        meta=ours["meta"],
    )
    trained = {n for n, p in source.parameters.items() if p.trainable}
    if average is not None and trained <= averages.keys():
        source.states = (*source.states, "ema")
    if not adam.known:
        source.notes.append("it holds no optimizer state: moments begin at zero")
    used = [prefix or None, average, "train_state.", *(f"{adam.root}{w}" for w in ("state.", "param_groups"))]
    if beside := _beside(keys, [u for u in used if u is not None], parameters):
        source.notes.append(f"left out {beside}")
    for number, portion in enumerate(_portions(source.parameters, len(source.states))):
        here = [] if number else [n for n in buffers if n in weights]
        source.parts.append(partial(_part, store, source, weights, averages, adam, portion, here))
    return source


@dataclass
class _State:
    """Where Adam's state of a parameter lies: the key of each moment, and the updates it has counted."""

    moments: dict[str, str]
    step: int


@dataclass
class _Adam:
    """The optimizer: the prefix of its keys, states by parameter, the names it steps, settings of its groups."""

    root: str
    known: bool
    states: dict[str, _State]
    members: set[str]
    groups: list[dict[str, Any]]


def _keys(store: Store) -> dict[str, str]:
    """Keys as they are, by keys without wrappers."""
    keys: dict[str, str] = {}
    for key in (*store.tensors, *store.objects):
        plain = _WRAPPERS.sub("", key)
        if plain in keys:
            raise UserError(f"{store.folder}: {keys[plain]} and {key} are one name without wrappers")
        keys[plain] = key
    return keys


def _prefixes(store: Store, keys: Mapping[str, str], names: set[str]) -> tuple[str, str | None]:
    """What stands before the names of the weights, and of the averages where there are any."""
    count: Counter[str] = Counter()
    for plain, key in keys.items():
        if key in store.tensors:
            starts = [0, *(m.end() for m in re.finditer(r"\.", plain))]
            count.update(plain[:at] for at in starts if plain[at:] in names)
    most = max(count.values(), default=0)
    found = sorted(p for p in count if 2 * count[p] > most)
    trained = [p for p in found if not _EMA.search(p)]
    averaged = [p for p in found if _EMA.search(p)]
    # torchtitan has its model at the top; a folder of ours has it there too.
    if len(trained) > 1 and "" in trained:
        trained.remove("")
    if not trained:
        trained, averaged = averaged, []
    if not trained:
        listed = ", ".join(list(keys)[:3])
        raise UserError(f"{store.folder} holds no tensor of this model; its keys are {listed}, ...")
    if len(trained) > 1 or len(averaged) > 1:
        raise UserError(
            f"{store.folder} holds several models: {', '.join(repr(p) for p in found)}; save one of them alone"
        )
    return trained[0], averaged[0] if averaged else None


def _under(store: Store, keys: Mapping[str, str], prefix: str, parameters: Sequence[str]) -> dict[str, str]:
    """Keys of the tensors of the model whose names have ``prefix``; at the top, of what is called as parts of it are."""
    tops = _tops(parameters)
    return {
        plain.removeprefix(prefix): key
        for plain, key in keys.items()
        if key in store.tensors and plain.startswith(prefix) and (prefix or plain.partition(".")[0] in tops)
    }


def _tops(names: Sequence[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def _beside(keys: Mapping[str, str], used: Sequence[str], parameters: Sequence[str]) -> str:
    """What nobody has read, by the first words of its keys."""
    tops = _tops(parameters)
    left = {k.partition(".")[0] for k in keys if not k.startswith(tuple(used))}
    return ", ".join(sorted(left - tops))


def _adam(store: Store, keys: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> _Adam:
    """The optimizer's states by parameter, wherever they lie."""
    fields: dict[tuple[str, str], dict[str, str]] = {}
    for plain in keys:
        stem, _, what = plain.rpartition(".")
        for match in re.finditer(r"(?:^|(?<=\.))state\.", stem):
            name = stem[match.end() :]
            if name in shapes or name.isdecimal():
                fields.setdefault((stem[: match.start()], name), {})[what] = keys[plain]
    roots = sorted({root for root, _ in fields})
    if not roots:
        return _Adam("optimizer.", False, {}, set(shapes), [])
    if len(roots) > 1:
        raise UserError(
            f"{store.folder} holds several optimizers: {', '.join(roots)}; save them as one, by get_state_dict"
        )
    root = roots[0]
    groups, members = _groups(store, keys, root, shapes)
    by_name = {name: found for (_, name), found in fields.items()}
    if any(name.isdecimal() for name in by_name):
        by_name, members = _named(store, by_name, members, shapes)
    states = {}
    for name, found in by_name.items():
        missing = [w for w in (*MOMENTS, "step") if w not in found]
        if missing:
            raise UserError(
                f"{store.folder}: the optimizer has {', '.join(sorted(found))} of {name}, but no {missing[0]}: "
                "only from Adam's state can training resume"
            )
        moments: dict[str, str] = {m: found[m] for m in MOMENTS}
        for moment, key in moments.items():
            if key not in store.tensors or store.shape(key) != shapes[name]:
                raise UserError(f"{store.folder}: {moment} of {name} is not of its shape {shapes[name]}")
        states[name] = _State(moments, _whole_number(store, found["step"]))
    settings = [{k: _plain(g[k]) for k in _SETTINGS if k in g} for g in groups]
    return _Adam(root, True, states, {*states, *(n for group in members for n in group)}, settings)


def _groups(
    store: Store, keys: Mapping[str, str], root: str, shapes: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """Settings of the optimizer's groups, for the reader, and the names or numbers of their members."""
    before = f"{root}param_groups"
    if before in keys:  # torch 2.3 and older kept a list without tensors as one object
        groups = store.value(keys[before])
        listed = [dict(g) for g in groups] if isinstance(groups, list) else []
        return listed, [_members(g) for g in listed]
    by_number: dict[int, dict[str, Any]] = {}
    by_name: dict[str, dict[str, str]] = {}
    for plain, key in keys.items():
        if plain.startswith(f"{before}."):
            stem, _, what = plain[len(before) + 1 :].rpartition(".")
            if stem.isdecimal() and what in (*_SETTINGS, "params"):
                by_number.setdefault(int(stem), {})[what] = store.value(key)
            elif stem in shapes:
                by_name.setdefault(stem, {})[what] = key
    if by_number:
        listed = [by_number[n] for n in sorted(by_number)]
        return listed, [_members(g) for g in listed]
    settings: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name, found in by_name.items():
        values = {k: store.value(found[k]) for k in _SETTINGS if k in found}
        settings.setdefault(repr(values), (values, []))[1].append(name)
    return [v for v, _ in settings.values()], [n for _, n in settings.values()]


def _members(group: Mapping[str, Any]) -> list[str]:
    return [_WRAPPERS.sub("", str(p)) for p in group.get("params") or ()]


def _named(
    store: Store, by_number: dict[str, dict[str, str]], members: list[list[str]], shapes: Mapping[str, Any]
) -> tuple[dict[str, dict[str, str]], list[list[str]]]:
    """Names instead of the numbers that ``optimizer.state_dict()`` has. Raises UserError where shapes leave a choice."""
    numbered = [[by_number.get(p) for p in group] for group in members]
    if not numbered:
        raise UserError(f"{store.folder}: the optimizer's states are numbered, and its groups are missing")
    names = name_states(
        shapes,
        [
            [None if s is None or "exp_avg" not in s else store.shape(s["exp_avg"]) for s in g]
            for g in numbered
        ],
    )
    pairs = [(n, s) for group, states in zip(names, numbered) for n, s in zip(group, states)]
    return {n: s for n, s in pairs if s is not None}, [list(group) for group in names]


def _parameter(name: str, shape: tuple[int, ...], adam: _Adam) -> Parameter:
    if name in adam.states:
        return Parameter(shape, True, adam.states[name].step)
    # A parameter of the optimizer that never had a gradient has no state yet; one that is in no group is frozen.
    trainable = not adam.known or name in adam.members
    return Parameter(shape, trainable, 0 if trainable else None)


def _progress(store: Store) -> dict[str, int]:
    found = {}
    for what in ("step", "samples_seen"):
        key = f"train_state.{what}"
        if key in store.tensors or key in store.objects:
            found[what] = _whole_number(store, key)
    return found


def _ours(store: Store) -> dict[str, Any]:
    """What ``dcp_write`` notes beside the tensors; empty for anybody else's checkpoint."""
    if "train_state.dattrain" not in store.tensors:
        return {"stage": 0, "engine": {}, "meta": {}}
    try:
        noted = json.loads(bytes(store.tensor("train_state.dattrain").tolist()))
        return {"stage": int(noted["stage"]), "engine": dict(noted["engine"]), "meta": dict(noted["meta"])}
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(f"{store.folder}: train_state.dattrain is not as it was written ({e})") from e


def _whole_number(store: Store, key: str) -> int:
    value = store.value(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or value != int(value):
        raise UserError(f"{store.folder}: {key} is {value!r}, no count")
    return int(value)


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


# Tensors


def _portions(parameters: Mapping[str, Parameter], states: int) -> list[list[str]]:
    """Names in the model's order, in portions of at most ``PART`` elements of all states (or one parameter)."""
    portions: list[list[str]] = [[]]
    size = 0
    for name, parameter in parameters.items():
        if portions[-1] and size + states * parameter.numel > PART:
            portions.append([])
            size = 0
        portions[-1].append(name)
        size += states * parameter.numel
    return portions


def _part(
    store: Store,
    source: Source,
    weights: Mapping[str, str],
    averages: Mapping[str, str],
    adam: _Adam,
    names: Sequence[str],
    buffers: Sequence[str],
) -> dict[Piece, Tensor]:
    found: dict[Piece, Tensor] = {}

    def put(state: str, name: str, tensor: Tensor) -> None:
        if not tensor.is_floating_point():
            raise UserError(f"{store.folder}: {state} of {name} is of {tensor.dtype}")
        if tensor.numel():
            found[Piece(state, name, 0, tensor.numel())] = tensor.reshape(-1).to(torch.float32)

    for name in names:
        put("param", name, store.tensor(weights[name]))
        if not source.parameters[name].trainable:
            continue
        for moment in MOMENTS:
            state = adam.states.get(name)
            zeros = torch.zeros(math.prod(source.parameters[name].shape))
            put(moment, name, zeros if state is None else store.tensor(state.moments[moment]))
        if "ema" in source.states:
            put("ema", name, store.tensor(averages[name]))
    for name in buffers:
        value = store.tensor(weights[name])
        if value.dtype not in DTYPE_NAMES:
            raise UserError(f"{store.folder}: buffer {name} is of {value.dtype}")
        piece = Piece("buffer", name, 0, value.numel(), DTYPE_NAMES[value.dtype], tuple(value.shape))
        found[piece] = value
    return found
