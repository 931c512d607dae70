"""The map of the repository is the repository: docs/structure.md, and what each package says of itself."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "structure.md").read_text()
PACKAGES = sorted(path.parent for path in (ROOT / "dattrain").rglob("__init__.py"))


def listed() -> list[str]:
    """Folders of the page's tree, by their indentation."""
    above: list[str] = []
    found = []
    for line in re.search(r"```\n(.*?)```", PAGE, re.DOTALL)[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        above = [*above[:depth], line.split()[0].rstrip("/")]
        found.append("/".join(above))
    return found


def test_the_tree_is_the_one_that_the_page_shows():
    shown = listed()
    assert len(shown) == len(set(shown))
    assert not [folder for folder in shown if not (ROOT / folder).is_dir()]
    packages = {path.relative_to(ROOT).as_posix() for path in PACKAGES} - {"dattrain"}
    assert packages <= set(shown)
    for top in ("configs", "launch", "tests", "docs", "benchmarks"):
        inside = {
            path for path in (ROOT / top).iterdir() if path.is_dir() and not path.name.startswith((".", "__"))
        }
        assert {path.relative_to(ROOT).as_posix() for path in inside} <= set(shown)


def test_the_files_that_decide_are_there():
    rows = re.findall(r"^\| .+ \| `(.+)` \|$", PAGE, re.MULTILINE)
    assert len(rows) >= 10
    assert not [row for row in rows if not (ROOT / row).is_file()]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_package_says_what_lives_in_it(package):
    """In a few sentences, whose names of modules exist."""
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    assert len(re.findall(r"[.:](?=\s|$)", text)) >= 2, f"{package.name} says too little of itself"
    for name in re.findall(r"``(dattrain(?:\.\w+)+)``", text):
        parts = name.split(".")
        assert any(_is_module(parts[:cut]) for cut in (len(parts), len(parts) - 1)), f"{name} is not there"


def _is_module(parts: list[str]) -> bool:
    try:
        return len(parts) > 0 and find_spec(".".join(parts)) is not None
    except ModuleNotFoundError:
        return False
