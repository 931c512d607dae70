"""Checks of what ``dat.DAT`` is called with: each says what is wrong by the argument's name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from dattrain.errors import UserError

Size = int | tuple[int, int]
WindowSize = int | Sequence[int | Sequence[int]]
StemKind = Literal["patch", "conv"]
MlpKind = Literal["linear", "conv"]

BLOCK_KINDS = "LSDPN"


def pair(size: Size | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a side or a pair, in pixels."""
    sides = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(sides) != 2 or not all(map(_is_side, sides)):
        raise UserError(f"img_size={size!r} must be a positive side, or height and width")
    return int(sides[0]), int(sides[1])


def check_window_size(value: WindowSize | None, stages: int) -> int | tuple[tuple[int, int], ...] | None:
    """One side for all stages as it is; else (height, width) of each stage's windows.

    Two numbers are height and width of all, as timm's Swin takes them; other sequences have an entry per stage, a side or a pair.

    Raises:
        UserError: neither of these, or two different numbers for two stages, which can be read both ways.
    """
    if value is None or _is_side(value):
        return value  # type: ignore[return-value]
    entries: list[Any] = (
        list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    )
    if len(entries) == 2 and all(map(_is_side, entries)):
        if stages == 2 and entries[0] != entries[1]:
            raise UserError(
                f"window_size={value!r} can be height and width or one side per stage: write a (height, width) for each of "
                "the two stages"
            )
        entries = [entries] * stages
    pairs = [[each, each] if _is_side(each) else each for each in entries]
    if any(
        not isinstance(each, Sequence) or len(each) != 2 or not all(map(_is_side, each)) for each in pairs
    ):
        raise UserError(
            f"window_size={value!r} must be a positive side, (height, width), or one of these per stage"
        )
    if len(pairs) != stages:
        raise UserError(f"window_size={value!r} has {len(pairs)} entries, but blocks has {stages} stages")
    return tuple((int(height), int(width)) for height, width in pairs)


def check_choices(**choices: tuple[object, Any]) -> None:
    """Each keyword is (value, Literal that must hold it)."""
    for name, (value, literal) in choices.items():
        if value not in get_args(literal):
            raise UserError(
                f"{name}={value!r} is not known; choose one of {', '.join(map(str, get_args(literal)))}"
            )


def per_stage(name: str, value: int | Sequence[int], stages: int) -> tuple[int, ...]:
    """One positive integer per stage; a single one serves all."""
    values = (value,) * stages if isinstance(value, int) else tuple(value)
    if len(values) != stages:
        raise UserError(f"{name}={list(values)} has {len(values)} entries, but blocks has {stages} stages")
    if any(not isinstance(each, int) or each < 1 for each in values):
        raise UserError(f"{name}={list(values)} must be positive integers")
    return values


def check_blocks(
    blocks: Sequence[str],
    dims: Sequence[int],
    heads: Sequence[int],
    groups: Sequence[int],
    offset_kernels: Sequence[int],
    neighborhood: Sequence[int],
) -> None:
    """Letters are known; heads divide channels and groups divide heads; kernels and neighbourhoods are odd."""
    for stage, kinds in enumerate(blocks):
        if not kinds or set(kinds) - set(BLOCK_KINDS):
            raise UserError(
                f"blocks[{stage}]={kinds!r} must be a string of the letters {', '.join(BLOCK_KINDS)}"
            )
        if dims[stage] % heads[stage]:
            raise UserError(f"dims[{stage}]={dims[stage]} is not a multiple of heads[{stage}]={heads[stage]}")
        if "D" in kinds and heads[stage] % groups[stage]:
            raise UserError(
                f"heads[{stage}]={heads[stage]} is not a multiple of groups[{stage}]={groups[stage]}"
            )
        for kind, name, sides in (
            ("D", "offset_kernels", offset_kernels),
            ("N", "neighborhood", neighborhood),
        ):
            if kind in kinds and sides[stage] % 2 == 0:
                raise UserError(f"{name}[{stage}]={sides[stage]} must be odd")


def check_offset_range(value: object) -> None:
    """A limit above 0 or one of the named ranges."""
    if not (value in ("free", "tanh", "clamp") or (_is_number(value) and value > 0)):  # type: ignore[operator]
        raise UserError(f"offset_range={value!r} must be a number above 0, 'free', 'tanh' or 'clamp'")


def check_positive(**values: object) -> None:
    """Each is a number above 0."""
    for name, value in values.items():
        if not (_is_number(value) and value > 0):  # type: ignore[operator]
            raise UserError(f"{name}={value!r} must be a number above 0")


def check_rates(**values: object) -> None:
    """Each is a number in [0, 1)."""
    for name, value in values.items():
        if not (_is_number(value) and 0 <= value < 1):  # type: ignore[operator]
            raise UserError(f"{name}={value!r} must be a number in [0, 1)")


def _is_side(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
