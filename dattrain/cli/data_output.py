"""What the actions of ``dattrain data`` say of a set, on stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dattrain.data.source.dataset import Dataset
    from dattrain.data.source.index import LeftOut


def say(dataset: Dataset) -> None:
    """What was left out of a set or is wrong with it, on stderr."""
    for line in [*dataset.notes, *dataset.flaws]:
        print(line, file=sys.stderr)


def say_left_out(left_out: list[LeftOut]) -> bool:
    """Count by kind what no sample has; returns whether something is lost by it."""
    from dattrain.data.source.build_index import describe

    if left_out:
        total = sum(some.count for some in left_out)
        print(f"{total:,} members left out: {describe(left_out)}", file=sys.stderr)
    return any(some.lost for some in left_out)
