"""``--array key=v1,v2 ...``: the runs of an array, one for each combination of values. Pure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from dattrain.errors import ConfigError
from dattrain.urls import mask


def combinations(words: Sequence[str]) -> list[tuple[str, ...]]:
    """The product of ``key=v1,v2`` words: for each run its overrides ``key=value``, the last key changing fastest.

    Raises:
        ConfigError: a word is no key with values, or a key or a value is there twice.
    """
    choices: dict[str, list[str]] = {}
    for word in words:
        key, sign, values = word.partition("=")
        listed = _split(values)
        if not sign or not listed:
            raise ConfigError(f"--array {word}: write key=v1,v2,… as in optim.lr=1e-3,5e-4")
        if key in choices:
            raise ConfigError(
                f"--array {word}: {key} is there twice; write all of its values behind one {key}="
            )
        if len(set(listed)) < len(listed):
            raise ConfigError(f"--array {word}: a value is there twice")
        choices[key] = [f"{key}={value}" for value in listed]
    return list(itertools.product(*choices.values()))


def names(runs: Sequence[tuple[str, ...]]) -> list[str]:
    """A folder's name for each run: its values, without those that all runs share where any differ.

    Raises:
        ConfigError: two runs would have the same.
    """
    shared = set.intersection(*map(set, runs))
    found: dict[str, tuple[str, ...]] = {}
    for run in runs:
        telling = [value for value in run if value not in shared] or run
        name = ",".join(re.sub(r"[^\w.=+-]", "_", mask(value)) for value in telling)
        if name in found:
            raise ConfigError(
                f"--array: {' '.join(found[name])} and {' '.join(run)} would both be trained in a folder {name}; "
                "submit one of them by itself, with another --run"
            )
        found[name] = run
    return list(found)


def _split(values: str) -> list[str]:
    """Divide values at commas, but not within brackets: ``[1,2],[3,4]`` is two."""
    parts, depth, start = [], 0, 0
    for position, letter in enumerate(values):
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            parts.append(values[start:position])
            start = position + 1
    return [part.strip() for part in [*parts, values[start:]] if part.strip()]
