"""Run folders by what a user names: a run, an array, a chain, or a folder of runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dattrain.errors import ConfigError
from dattrain.files import shown

relative = shown


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
