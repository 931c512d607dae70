"""Run folders by what a user names: a run, an array, a chain, or a folder of runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dattrain.errors import ConfigError


def find(given: Sequence[str]) -> list[Path]:
    """Run folders under each given one: itself, the stages of a chain, the runs of an array, or all below a parent.

    Raises:
        ConfigError: there is none.
    """
    found: list[Path] = []
    for name in given:
        folder = Path(name)
        if (folder / "submit" / "history.jsonl").is_file() or (folder / "config.yaml").is_file():
            found.append(folder)
        elif (folder / "chain.json").is_file():
            stages = json.loads((folder / "chain.json").read_text(encoding="utf-8"))["stages"]
            found += [folder / stage["name"] for stage in stages]
        else:
            below = sorted(
                {p.parent for pattern in ("*/config.yaml", "*/*/config.yaml") for p in folder.glob(pattern)}
            )
            if not below:
                raise ConfigError(f"{folder}: no run folder, and none below it")
            found += below
    return found


def titles(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=1)):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(each) for each in parts]
