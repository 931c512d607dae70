"""Class numbers as people write them into ``.cls`` and ``.json``: one rule for the index, packing and streams."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from dattrain.data.source.index import MAX_LABEL
from dattrain.errors import UserError

LABEL_FIELDS = ("label", "cls", "class_id")
"""Fields of ``.json`` that are looked into when none is named."""


def as_label(value: object, where: str) -> int | None:
    """A label as people write it: 7, 7.0, "7", " 7.0"; None where it is no whole number.

    Raises:
        UserError: it is negative or larger than ``MAX_LABEL``.
    """
    if isinstance(value, str):
        # A BOM is no part of a number.
        match = re.fullmatch(r"\ufeff?\s*([+-]?)0*(\d+)(?:\.0*)?\s*", value, re.ASCII)
        if match is None:
            return None
        value = int(match[1] + match[2][:20])
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    if value < 0:
        raise UserError(f"{where}: label {_short(value)} is negative")
    if value > MAX_LABEL:
        raise UserError(f"{where}: label {_short(value)} is larger than {MAX_LABEL:,}, and no class number")
    return value


def label_of(content: Any, fields: Sequence[str], where: str) -> tuple[int | None, str | None]:
    """Label from the first of the fields of a ``.json`` that holds one; and what was seen where none does."""
    seen = None
    for name in fields:
        value = content.get(name) if isinstance(content, dict) else None
        label = as_label(value, where)
        if label is not None:
            return label, None
        if value is not None and seen is None:
            seen = f"{name} {_short(value)}"
    return None, seen


def parse_json(data: bytes, where: str) -> Any:
    """The content of a ``.json`` member. Raises UserError where it does not parse."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: its .json does not parse ({error})") from None


def _short(value: object) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep; more digits than Python prints
        text = f"of type {type(value).__name__}"
    return text if len(text) <= 40 else text[:37] + "..."
