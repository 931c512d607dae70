"""Read a recipe: YAML with ``extends:``, ``key=value`` overrides, and the place where each value came from.

Pure but for reading files. The schema is in ``schema``; what follows from a config and a world size in ``derive``.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dattrain.config import comments, shipped
from dattrain.config.explain import explain
from dattrain.config.reference import scalar
from dattrain.config.schema import RENAMED, Config
from dattrain.errors import ConfigError

COMMAND_LINE, SETTINGS = "command line", "settings given"
"""Places of what is given over a recipe as words (``key=value``), and as a mapping."""
DEFAULT = "default"

Overrides = Sequence[str] | Mapping[str, Any]
"""What goes over a recipe: words ``section.key=value``, the value in YAML; or dotted key to value."""

log = logging.getLogger(__name__)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-4`` as a string and ``on`` as a boolean; a recipe means a float, and true or false alone."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in rules
        if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool")
    ]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\.\d[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+)$"
    ),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


@dataclass(frozen=True)
class Loaded:
    """A validated config and, for each dotted key, where its value came from (``file:line`` or ``command line``).

    ``comments`` are what files say behind their values, by place.
    """

    config: Config
    provenance: Mapping[str, str]
    comments: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Tree:
    """Raw values by dotted key, with their places; mappings are kept as nested dicts."""

    values: dict[str, Any]
    places: dict[str, str]
    comments: dict[str, str] = field(default_factory=dict)


def load(path: str | Path, overrides: Overrides = ()) -> Loaded:
    """Load a recipe (a file, or one of the shipped by its name) or that of a run folder, and apply ``overrides``.

    Raises:
        ConfigError: the file is missing or not YAML, ``extends`` runs in a circle, a key is unknown (the nearest one is
            named), or a value does not fit; the message names file and line, or "command line".
    """
    found = shipped.find(path)
    recorded = found / "config.yaml"
    file = recorded if recorded.is_file() else found
    tree = _read(file, ())
    if file.name == "config.yaml":
        _find_beside(tree, file.absolute().parent)
    return _resolve(tree, overrides)


SPLIT_SUFFIX = ".images.json"
"""What the name of a list of images ends in (``data.source.split_file``)."""
OWN_WEIGHTS = "init.safetensors"
"""In a run folder: the authors' weights in our names, which that run started from (``pretrained.start_from``)."""


def _find_beside(tree: _Tree, run: Path) -> None:
    """Point what a run has in its own folder (``cli.own_images``) to where that folder is now: it may have been moved."""
    for section, key in (("data", "train"), ("data", "val"), ("init", "from")):
        values = tree.values.get(section)
        if not isinstance(values, dict):
            continue
        name = values.get(key)
        if isinstance(name, str) and name.endswith((SPLIT_SUFFIX, f"/{OWN_WEIGHTS}")):
            beside = run / Path(name).name
            if beside.is_file():
                values[key] = str(beside)


def _given(overrides: Overrides) -> _Tree:
    tree = _Tree({}, {})
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            tree = _merge(tree, _nest(key, value, SETTINGS))
    else:
        for override in overrides:
            tree = _merge(tree, _parse_override(override))
    _rename(tree)
    return tree


def loads(text: str, overrides: Overrides = (), *, source: str = "<text>") -> Loaded:
    """As ``load``, from a string, whose ``extends`` begins in the current folder."""
    return _resolve(_extend(_parse(text, source), source, Path(), ()), overrides)


def _resolve(tree: _Tree, overrides: Overrides) -> Loaded:
    """Validate a raw tree after applying the overrides."""
    tree = _merge(tree, _given(overrides))
    try:
        config = Config.model_validate(tree.values)
    except ValidationError as error:
        raise ConfigError(explain(error, Config, DEFAULT, tree.places)) from None
    return Loaded(config, tree.places, tree.comments)


def dump(config: Config, reasons: Mapping[str, str] | None = None) -> str:
    """The config as YAML, every key, with comments by dotted key; ``loads`` gives back an equal one."""
    text = yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False, width=110)
    return comments.annotate(text, reasons) if reasons else str(text)


def reasons(loaded: Loaded) -> dict[str, str]:
    """What files say behind the values that hold, by dotted key."""
    return {
        key: loaded.comments[place] for key, place in loaded.provenance.items() if place in loaded.comments
    }


def given(overrides: Overrides) -> dict[str, Any]:
    """The values of overrides by dotted key, as they stand: whether the schema knows them is for ``load`` to say."""
    tree = _given(overrides)
    found = {}
    for key in tree.places:
        value: Any = tree.values
        for part in key.split("."):
            value = value[part]
        found[key] = value
    return found


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key to value, in the schema's order; free-form mappings count as one value."""

    def walk(model: BaseModel, prefix: str) -> Iterable[tuple[str, Any]]:
        for name, info in type(model).model_fields.items():
            key = prefix + (info.alias or name)
            value = getattr(model, name)
            if isinstance(value, BaseModel):
                yield from walk(value, key + ".")
            else:
                yield key, value

    return dict(walk(config, ""))


def changed(config: Config) -> dict[str, Any]:
    """Of ``flatten``, what is not as by default."""
    usual = flatten(Config())
    return {key: value for key, value in flatten(config).items() if value != usual[key]}


def show(loaded: Loaded) -> str:
    """One line per key: ``key: value  # where it came from``, and what is said there."""

    def place(key: str) -> str:
        place = origin(loaded, key)
        return f"{place}: {loaded.comments[place]}" if place in loaded.comments else place

    rows = [(f"{key}: {scalar(value)}", place(key)) for key, value in flatten(loaded.config).items()]
    width = min(60, max(len(row) for row, _ in rows))
    return "\n".join(f"{row:<{width}}  # {place}" for row, place in rows)


def diff(a: Loaded, b: Loaded) -> list[tuple[str, str, str]]:
    """Keys whose values differ: (key, value in a with its place, value in b with its place)."""
    left, right = flatten(a.config), flatten(b.config)
    return [
        (key, f"{scalar(left[key])}  ({origin(a, key)})", f"{scalar(right[key])}  ({origin(b, key)})")
        for key in left
        if left[key] != right[key]
    ]


def origin(loaded: Loaded, key: str) -> str:
    """Where the value of ``key`` came from; a mapping's place is that of its last entry."""
    places = [
        place for known, place in loaded.provenance.items() if known == key or known.startswith(key + ".")
    ]
    return places[-1] if places else DEFAULT


def _read(path: Path, chain: tuple[Path, ...], asked: str = "") -> _Tree:
    path = path.resolve() if chain else path
    if path.resolve() in chain:
        raise ConfigError(f"{path}: extends runs in a circle: {' -> '.join(str(p) for p in (*chain, path))}")
    if not path.is_file():
        raise ConfigError(f"{asked}{path}: no such config{_similar_file(path)}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a recipe: it is no UTF-8 text") from None
    return _extend(_parse(text, str(path)), str(path), path.parent, (*chain, path.resolve()))


def _extend(tree: _Tree, source: str, folder: Path, chain: tuple[Path, ...]) -> _Tree:
    """Merge a tree over those that its ``extends`` names, in ``folder`` or of the shipped."""
    bases = tree.values.pop("extends", None)
    place = tree.places.pop("extends", source)
    if bases is None:
        return tree
    if isinstance(bases, str):
        bases = [bases]
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{place}: extends must be a file or a list of files, not {bases!r}")
    merged = _Tree({}, {})
    for base in bases:
        beside = folder / base
        file = beside if beside.is_file() else shipped.named(base) or beside
        merged = _merge(merged, _read(file, chain, f"{place}: extends: "))
    return _merge(merged, tree)


def _similar_file(path: Path) -> str:
    if shipped.named(path, shipped.CHAINS) is not None:
        return f"; it is a chain: dattrain submit {path}"
    names = [p.name for p in path.parent.glob("*.yaml")]
    near = difflib.get_close_matches(path.name, names, 1)
    meant = path.parent / near[0] if near else shipped.nearest(path)
    if meant is not None:
        return f"; did you mean {meant}?"
    return "" if path.parent.is_dir() else f" (there is no folder {path.parent})"


def _parse(text: str, source: str) -> _Tree:
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{source}:{line}: not YAML: {error.problem}") from None
    tree = _Tree({}, {})
    if node is None:
        return tree
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{source}:1: a config is a mapping of sections, not a list or a single value")
    _walk(node, tree, tree.values, "", source, text.splitlines())
    _rename(tree)
    return tree


def _rename(tree: _Tree) -> None:
    """Give keys of ``RENAMED`` their names of now, in place; a line says so for each."""
    for old, new in RENAMED.items():
        if old not in tree.places:
            continue
        if new in tree.places:
            raise ConfigError(
                f"{tree.places[old]}: {old} is called {new} now, and both are set; leave {old} out"
            )
        *sections, name = old.split(".")
        values = tree.values
        for part in sections:
            values = values[part]
        values[new.rpartition(".")[2]] = values.pop(name)
        tree.places[new] = tree.places.pop(old)
        log.warning("%s: %s is called %s now", tree.places[new], old, new)


def _walk(
    node: yaml.MappingNode, tree: _Tree, into: dict[str, Any], prefix: str, source: str, lines: Sequence[str]
) -> None:
    """Read a mapping into ``into``, which is ``tree``'s values or a mapping in them."""
    places = tree.places
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in into:
            raise ConfigError(f"{source}:{line}: {prefix}{key} is set twice")
        if isinstance(value_node, yaml.MappingNode):
            into[key] = {}
            if not value_node.value:
                places[prefix + key] = f"{source}:{line}"
            _walk(value_node, tree, into[key], f"{prefix}{key}.", source, lines)
        else:
            loader = _Loader("")
            try:
                into[key] = loader.construct_object(value_node, deep=True)
            except yaml.YAMLError as error:
                raise ConfigError(
                    f"{source}:{line}: {prefix}{key}: {getattr(error, 'problem', error)}"
                ) from None
            finally:
                loader.dispose()
            places[prefix + key] = place = f"{source}:{line}"
            if said := comments.behind(lines, key_node, value_node):
                tree.comments[place] = said


def _parse_override(override: str) -> _Tree:
    key, sep, raw = override.partition("=")
    if not sep or not key or key.strip() != key:
        raise ConfigError(f"{COMMAND_LINE}: {override!r} is not of the form section.key=value")
    try:
        return _nest(key, yaml.load(raw, Loader=_Loader), COMMAND_LINE)
    except yaml.YAMLError:
        raise ConfigError(f"{COMMAND_LINE}: {override}: the value is not YAML") from None


def _nest(key: str, value: Any, place: str) -> _Tree:
    """The tree of one value."""

    def leaves(key: str, value: Any) -> Iterable[str]:
        if not isinstance(value, dict) or not value:
            return [key]
        return (leaf for name, inner in value.items() for leaf in leaves(f"{key}.{name}", inner))

    places = dict.fromkeys(leaves(key, value), place)
    for part in reversed(key.split(".")):
        value = {part: value}
    return _Tree(value, places)


def _merge(base: _Tree, over: _Tree) -> _Tree:
    places = dict(base.places)
    for key in over.places:
        parents = [".".join(key.split(".")[:n]) for n in range(1, key.count(".") + 1)]
        for stale in [k for k in places if k.startswith(key + ".") or k in parents]:
            del places[stale]
    return _Tree(
        _merge_values(base.values, over.values),
        {**places, **over.places},
        {**base.comments, **over.comments},
    )


def _merge_values(base: Any, over: Any) -> Any:
    if isinstance(base, dict) and isinstance(over, dict):
        return {**base, **{key: _merge_values(base.get(key), value) for key, value in over.items()}}
    return over
