"""What the package imports is what it declares, and what is declared is locked."""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
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
    # What a service's own client brings along is the user's choice; tests of the two loggers use it where it is.
    assert {name for name in declared() if name not in ("gcsfs", "wandb", "mlflow")} <= {
        name.replace("_", "-") for name in lock
    }


def test_every_python_that_is_declared_can_install_the_pins():
    """As far as this environment knows: what a pin's release says of Python is read where that release is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared_pythons = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    needs = {
        (canonicalize_name(d.name), d.version): SpecifierSet(d.metadata.get("Requires-Python", ""))
        for d in distributions()
    }
    known = 0
    for line in (ROOT / "requirements.lock").read_text().splitlines()[1:]:
        pin = Requirement(line)
        (version,) = (each.version for each in pin.specifier)
        allowed = needs.get((canonicalize_name(pin.name), version))
        known += allowed is not None
        for python in declared_pythons:
            full = f"{python}.0"
            chosen = pin.marker is None or pin.marker.evaluate(
                {"python_version": python, "python_full_version": full}
            )
            assert not (chosen and allowed is not None and not allowed.contains(full)), (
                f"{line}: {python} is declared, and this release needs Python {allowed}"
            )
    assert known
