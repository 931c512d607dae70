"""Recipes, chains and cluster profiles that travel with the package, and how they are found by name.

In a checkout ``dattrain/configs`` and ``dattrain/launch`` are links to the folders of the repository; a wheel holds copies.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from dattrain.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]
RECIPES = _PACKAGE / "configs"
CHAINS = _PACKAGE / "launch" / "chains"
CLUSTERS = _PACKAGE / "launch" / "clusters"


def names(folder: Path = RECIPES) -> dict[str, Path]:
    """Name (the path below ``folder`` without ``.yaml``) to file, sorted by name."""
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path.resolve()
        for path in sorted(folder.glob("**/*.yaml"))
    }


def named(word: str | Path, folder: Path = RECIPES) -> Path | None:
    """The one shipped file of that name, with or without its folders and ``.yaml``."""
    asked = Path(word).as_posix().removesuffix(".yaml")
    asked = asked.removeprefix(folder.relative_to(_PACKAGE).as_posix() + "/")
    found = [file for name, file in names(folder).items() if asked in (name, name.rpartition("/")[2])]
    return found[0] if len(found) == 1 else None


def find(word: str | Path, folder: Path = RECIPES) -> Path:
    """A file or run folder that is there, else the shipped file of that name, else ``word`` as a path for the caller to refuse.

    A folder that merely has the name of a recipe hides none.

    Raises:
        ConfigError: ``word`` is empty.
    """
    if not str(word):
        raise ConfigError("'' names no recipe and no run folder: `dattrain config list` shows the recipes")
    path = Path(word)
    if path.is_file() or any((path / name).is_file() for name in ("config.yaml", "chain.json")):
        return path
    return named(path, folder) or path


def nearest(word: str | Path) -> str | None:
    """The shipped recipe or chain that ``word`` may have meant."""
    known = {name.rpartition("/")[2]: name for name in (*names(RECIPES), *names(CHAINS))}
    near = difflib.get_close_matches(Path(word).name.removesuffix(".yaml").lower(), known, 1)
    return known[near[0]] if near else None
