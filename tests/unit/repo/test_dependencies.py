"""What the package imports is what it declares, and what is declared is locked."""

import re
import sys
from pathlib import Path

import pytest
from test_imports import FILES, imported

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[3]
NAMES = {
    "yaml": "pyyaml",
    "PIL": "pillow",
    "nvidia": "nvidia-dali-cuda130",
    "huggingface_hub": "huggingface-hub",
}
OPTIONAL = {"gcsfs", "skimage", "sklearn"}
"""Imported only where the user has them."""


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [
        line for extra in project["optional-dependencies"].values() for line in extra
    ]
    return {re.match(r"[\w-]+", line).group().lower().replace("_", "-") for line in lines} - {"dattrain"}


def test_every_import_is_declared():
    top = {module.split(".")[0] for path in FILES for module in imported(path)}
    foreign = top - set(sys.stdlib_module_names) - {"dattrain", "__future__"} - OPTIONAL
    assert {NAMES.get(name, name).lower().replace("_", "-") for name in foreign} <= declared() | {"triton"}


def test_every_dependency_is_locked():
    lock = {
        re.match(r"[\w.-]+", line).group().lower()
        for line in (ROOT / "requirements.lock").read_text().splitlines()[1:]
    }
    assert {name for name in declared() if name not in ("gcsfs",)} <= {
        name.replace("_", "-") for name in lock
    }
