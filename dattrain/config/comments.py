"""Comments behind the values of a YAML text: read, and written. So a run's ``config.yaml`` says why a value is what it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import yaml


def behind(lines: Sequence[str], key: yaml.Node, value: yaml.Node) -> str:
    """The comment on the line of a key, behind its value; "" where there is none."""
    mark = value.end_mark if _on_one_line(key, value) else key.end_mark
    rest = lines[mark.line][mark.column :].lstrip(" \t:")
    return rest[1:].strip() if rest.startswith("#") else ""


def annotate(text: str, comments: Mapping[str, str]) -> str:
    """``text``, a mapping as ``yaml.safe_dump`` writes it, with a comment behind each dotted key of ``comments``.

    A text that goes over several lines takes none.
    """
    lines = text.splitlines()
    for dotted, key, value in _leaves(yaml.compose(text, Loader=yaml.SafeLoader), ""):
        comment = " ".join(comments.get(dotted, "").split())
        if comment and (_on_one_line(key, value) or isinstance(value, yaml.SequenceNode)):
            lines[key.start_mark.line] += f"  # {comment}"
    return "\n".join(lines) + "\n"


def _on_one_line(key: yaml.Node, value: yaml.Node) -> bool:
    return bool(key.start_mark.line == value.start_mark.line == value.end_mark.line)


def _leaves(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        dotted = f"{prefix}{key.value}"
        yield dotted, key, value
        yield from _leaves(value, f"{dotted}.")
