"""Every key of a recipe with its type, default and meaning, for people: ``docs/keys.md`` and ``dattrain config keys``. Pure."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dattrain.config.explain import section
from dattrain.config.habits import meant
from dattrain.config.schema import Config


@dataclass(frozen=True)
class Key:
    """One key. ``type`` and ``default`` are as people read and write them."""

    name: str
    type: str
    default: str
    meaning: str
    choices: tuple[str, ...]
    """The values that it may have, where they can be listed."""


def all_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[Key]:
    """The keys in the schema's order; free-form mappings and lists of sections count as one."""
    for name, field in model.model_fields.items():
        key, inner = prefix + (field.alias or name), section(field.annotation)
        if inner is not None and isinstance(field.default, BaseModel):
            yield from all_keys(inner, f"{key}.")
            continue
        meaning = field.description or (inner.__doc__ if inner else "") or ""
        yield Key(
            key,
            readable(field.annotation, field.metadata),
            scalar(field.default),
            " ".join(meaning.split()),
            _choices(field.annotation),
        )


def markdown() -> str:
    """Every key, as Markdown: ``docs/keys.md`` is this text."""
    lines = [
        "# Every key of a recipe",
        "",
        "Written by `dattrain config keys`; the meanings live in `dattrain/config/sections.py` and `data_sections.py`.",
    ]
    for name, field in Config.model_fields.items():
        part = section(field.annotation)
        if part is None:
            continue
        lines += ["", f"## {name}", "", " ".join((part.__doc__ or "").split()), ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key in all_keys(part, f"{name}."):
            cells = (f"`{key.name}`", key.type, f"`{key.default}`", key.meaning)
            lines.append(
                f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |".replace("|  |", "| |")
            )
    return "\n".join(lines) + "\n"


def find(word: str) -> list[Key]:
    """Keys whose name or meaning holds ``word``, in whatever case; else those that other tools call so."""
    known = list(all_keys())
    found = [key for key in known if word.lower() in f"{key.name} {key.meaning}".lower()]
    named = meant(word, [key.name for key in known])
    return found or [key for key in known if key.name in named]


def listing(found: Sequence[Key]) -> str:
    """Keys for a terminal: two lines each."""
    return "".join(f"{key.name}={key.default}  ({key.type})\n    {key.meaning}\n" for key in found)


def readable(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words: ``int >= 1 or null``, ``"a" or "b"``, ``[float, float]``."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        found = [
            part for each in inner[1:] for part in (each.metadata if isinstance(each, FieldInfo) else [each])
        ]
        return readable(inner[0], [*found, *metadata])
    if origin in (Union, types.UnionType):
        parts = [readable(each, metadata) for each in inner if each is not type(None)]
        return " or ".join([*parts, *(["null"] if type(None) in inner else [])])
    if origin is Literal:
        return " or ".join(f"`{each}`" for each in inner)
    if origin is tuple and inner[-1] is not Ellipsis:
        return f"[{', '.join(readable(each) for each in inner)}]"
    if origin in (tuple, list):
        return f"list of {readable(inner[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"{{{', '.join(field.alias or name for name, field in annotation.model_fields.items())}}}"
    name = "mapping" if dict in (origin, annotation) else getattr(annotation, "__name__", str(annotation))
    return " ".join([name, *filter(None, [_bounds(metadata)])])


_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def _bounds(metadata: Sequence[Any]) -> str:
    """``> 0 and <= 1``; a multiple is said too."""
    found = []
    for each in metadata:
        found += [f"{sign} {getattr(each, name):g}" for name, sign in _SIGNS.items() if hasattr(each, name)]
        if hasattr(each, "multiple_of"):
            found.append(f"a multiple of {each.multiple_of:g}")
    return " and ".join(found)


def _choices(annotation: Any) -> tuple[str, ...]:
    inner = get_args(annotation)
    if annotation is bool:
        return ("true", "false")
    if get_origin(annotation) is Literal:
        return tuple(map(str, inner))
    if get_origin(annotation) in (Union, types.UnionType) and type(None) in inner:
        found = [_choices(each) for each in inner if each is not type(None)]
        return tuple(choice for each in found for choice in each) if all(found) else ()
    return ()


def scalar(value: Any) -> str:
    """A value as it is written in YAML on one line."""
    if isinstance(value, tuple):
        value = [item.model_dump() if isinstance(item, BaseModel) else item for item in value]
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).strip().removesuffix("...").strip()
