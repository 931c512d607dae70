"""What the keys of a recipe may be, and the base of its sections."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h)")


def seconds(text: str) -> float:
    """Seconds of ``30s``, ``2m`` or ``1.5h``. Raises ValueError."""
    found = _DURATION.fullmatch(text)
    if found is None or not float(found[1]):
        raise ValueError(f"write a number of updates from 1 on, or a time as 30s, 2m or 1h, not {text}")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def _interval(value: int | str) -> int | str:
    if isinstance(value, str) or value < 1:
        seconds(str(value))
    return value


Interval = Annotated[int | str, AfterValidator(_interval)]
"""Updates, or time."""


def _size(value: Any) -> Any:
    sides = value if isinstance(value, (list, tuple)) else [value]
    if (sides is value and len(sides) != 2) or any(type(side) is not int for side in sides):
        raise ValueError("write one number of pixels, or [height, width]")
    return value


Size = Annotated[int | tuple[int, int], BeforeValidator(_size)]
"""Pixels: a side, or height and width."""


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size in a recipe or in JSON."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


class Section(BaseModel):
    """Base of every section: immutable, and a misspelled key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
