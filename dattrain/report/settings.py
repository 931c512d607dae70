"""The settings of a run with where each came from, as far as the run folder tells: its comments, its command, the defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dattrain.config.load import COMMAND_LINE, DEFAULT, flatten
from dattrain.config.schema import Config
from dattrain.urls import mask


def rows(config: Config, text: str, command: Sequence[str]) -> list[list[Any]]:
    """[key, value, origin] of every setting, values as YAML, without secrets.

    Args:
        config: of the run.
        text: its ``config.yaml``; a comment behind a value says where that comes from.
        command: that the run was started with first: words ``key=value`` are of the command line, and what is neither one of
            those nor the default was set by the recipe that it names.
    """
    given = {word.partition("=")[0] for word in command if "=" in word and not word.startswith("-")}
    recipe = _recipe(command)
    usual, said = flatten(Config()), comments(text)
    found = []
    for key, value in flatten(config).items():
        if key in said:
            origin = said[key]
        elif any(word == key or word.startswith(key + ".") for word in given):
            origin = COMMAND_LINE
        else:
            origin = DEFAULT if value == usual[key] else recipe
        found.append([key, mask(_scalar(value)), mask(origin)])
    return found


def comments(text: str) -> dict[str, str]:
    """Dotted key to the comment that stands behind its value on the same line."""
    found: dict[str, str] = {}

    def walk(node: yaml.Node, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                walk(value, f"{prefix}.{key.value}" if prefix else str(key.value))
        elif prefix:
            # The buffer of a mark is gone by now; the text is ours.
            rest = text[node.end_mark.index :].partition("\n")[0].strip()
            if rest.startswith("#"):
                found[prefix] = rest.lstrip("# ")

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None:
        walk(root, "")
    return found


def differing(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """[key, value of each run ...] of the settings (``rows``) in which runs differ."""
    tables = [{key: value for key, value, _ in run["settings"]} for run in runs]
    keys = dict.fromkeys(key for table in tables for key in table)
    return [
        [key, *(table.get(key, "") for table in tables)]
        for key in keys
        if len({table.get(key) for table in tables}) > 1
    ]


def environment(starts: Sequence[Mapping[str, Any]], code: Mapping[str, Any]) -> list[list[str]]:
    """[name, value] of the last start and of the code."""
    revision = code.get("revision")
    dirty = ", with changes of its own (code.diff)" if code.get("dirty") else ""
    lines = [
        ["code", f"dattrain {code.get('version', '?')}" + (f" at {revision[:12]}{dirty}" if revision else "")]
    ]
    if starts:
        last = starts[-1]
        versions = last.get("versions") or {}
        lines += [
            ["command", mask(" ".join(map(str, last.get("command") or ())))],
            ["device", f"{last.get('world', '?')} x {last.get('device', '?')}"],
            ["started by", f"{last.get('launcher', '?')} on {last.get('host', '?')}, {last.get('platform', '?')}"],
            ["versions", ", ".join(f"{name} {version}" for name, version in versions.items())],
        ]  # fmt: skip
    return lines


def _recipe(command: Sequence[str]) -> str:
    words = list(command)
    if "train" in words[:-1]:
        asked = words[words.index("train") + 1]
        if "=" not in asked and not Path(asked, "config.yaml").is_file():
            return asked
    return "recipe"


def _scalar(value: Any) -> str:
    if isinstance(value, tuple):
        value = [item.model_dump() if hasattr(item, "model_dump") else item for item in value]
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).strip().removesuffix("...").strip()
