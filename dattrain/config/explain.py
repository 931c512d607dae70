"""Pydantic's errors as one line each for the user: place, key, what is wrong, what was seen."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from dattrain.config.habits import meant
from dattrain.config.schema import RENAMED, Config


def explain(
    error: ValidationError, model: type[BaseModel], source: str, places: Mapping[str, str] | None = None
) -> str:
    """Explain each error in a line; an unknown key comes with the nearest known one.

    Args:
        error: what ``model`` raised.
        model: the schema, whose keys are offered for an unknown one.
        source: the file (or whatever it was) that the values came from.
        places: finer than ``source``, where known: dotted key to ``file:line``.
    """
    return "\n".join(_line(item, model, source, places) for item in error.errors())


def section(annotation: Any) -> type[BaseModel] | None:
    """The model in a field's annotation (``Model``, ``Model | None``, ``tuple[Model, ...]``), or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, tuple):
        return next((inner for inner in map(section, get_args(annotation)) if inner), None)
    return None


def _line(item: Any, model: type[BaseModel], source: str, places: Mapping[str, str] | None) -> str:
    loc = [str(part) for part in item["loc"]]
    place, key = _place(loc, source, places or {})
    if item["type"] == "extra_forbidden":
        names = _names(model, loc[:-1])
        keys = {**{name: ".".join([*loc[:-1], name]) for name in names}, **_renamed(".".join(loc[:-1]))}
        close, far = (difflib.get_close_matches(loc[-1], keys, 1, cutoff=cutoff) for cutoff in (0.8, 0.5))
        elsewhere = meant(".".join(loc), _leaves(Config)) if model is Config else []
        found = [keys[name] for name in close] or elsewhere or [keys[name] for name in far]
        hint = f"did you mean {' or '.join(found)}?" if found else f"known here: {', '.join(names)}"
        return f"{place}: unknown key {'.'.join(loc)}; {hint}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "model_type" and model is Config and len(loc) == 1:
        inside = [key for key in _leaves(Config) if key.startswith(f"{loc[0]}.")]
        near_key = (meant(loc[0], inside) or inside)[0]
        return f"{place}: {key} is a section, and cannot be {item['input']!r}; did you mean {near_key}={item['input']}?"
    if not loc:
        if places is None:
            return f"{source}: {message}"
        named = dict.fromkeys(re.findall(r"[a-z_]+(?:\.[a-z_]+)+", message))
        set_at = "; ".join(f"{key}: {places[key]}" for key in named if key in places)
        return f"{message} ({set_at})" if set_at else message
    seen = "" if item["type"] == "missing" else f" (found {item['input']!r})"
    return f"{place}: {key}: {message[0].lower()}{message[1:]}{seen}"


def _place(loc: Sequence[str], source: str, places: Mapping[str, str]) -> tuple[str, str]:
    """Place and name of the longest part of a pydantic location that was set (unions add parts of their own)."""
    for n in range(len(loc), 0, -1):
        key = ".".join(loc[:n])
        hits = [place for known, place in places.items() if known == key or known.startswith(key + ".")]
        if hits:
            return hits[-1], key
    return source, ".".join(loc)


def _leaves(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted keys of every value of a schema."""
    found = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        nested = isinstance(inner, type) and issubclass(inner, BaseModel)
        key = prefix + (field.alias or name)
        found += _leaves(inner, f"{key}.") if nested else [key]  # type: ignore[arg-type]
    return found


def _renamed(section: str) -> dict[str, str]:
    """Former names of a section's keys, to the keys of now."""
    split = {key.rpartition("."): new for key, new in RENAMED.items()}
    return {name: new for (prefix, _, name), new in split.items() if prefix == section}


def _names(model: type[BaseModel], loc: Sequence[str]) -> list[str]:
    for part in loc:
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        # The key of a mapping's entry (a chain's stage) is no field; the value's model is looked for in the mapping.
        inner = section(fields[part].annotation) if part in fields else None
        if inner is None and part in fields and get_origin(fields[part].annotation) is dict:
            inner = section(get_args(fields[part].annotation)[1])
        if inner is not None:
            model = inner
    return [field.alias or name for name, field in model.model_fields.items()]
