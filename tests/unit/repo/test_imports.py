"""The import direction of the house, and who may name which library (docs/design/contracts.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[3] / "dattrain"
ROOMS = [
    "config",
    "models",
    "ops",
    "data",
    "engine",
    "state",
    "runtime",
    "observe",
    "submit",
    "tools",
    "demo",
]
MAY_IMPORT = {
    "config": set(),
    "ops": set(),
    "models": {"ops"},
    "runtime": {"config"},
    "data": {"config"},
    "state": {"runtime", "config"},
    "observe": {"runtime", "config"},
    "engine": {"state", "observe", "data", "models", "ops", "runtime", "config"},
    "submit": {"engine", "state", "observe", "runtime", "config"},
    "tools": set(ROOMS),
    "demo": set(),
}
OWNERS = {
    "deepspeed": ("engine/zero.py", "state/"),
    "nvidia": ("data/dali",),
    "submitit": ("submit/",),
    "triton": ("ops/",),
}
MEASURE = ("doctor", "data_pipelines", "checkpoint")
"""Verbs that report on a library or measure against it."""
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> list[tuple[str, bool]]:
    """(module, at import time) for every import in a file; those inside functions run later."""
    tree = ast.parse(path.read_text())
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append((node.module, id(node) not in lazy))
            found += [(f"{node.module}.{alias.name}", id(node) not in lazy) for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    inside = path.relative_to(PACKAGE)
    room = inside.parts[0] if len(inside.parts) > 1 else None
    for module, _ in imported(path):
        parts = module.split(".")
        if parts[0] == "dattrain" and len(parts) > 1 and parts[1] in ROOMS and room and parts[1] != room:
            assert parts[1] in MAY_IMPORT[room], (
                f"{inside} imports {module}: {room} may import {MAY_IMPORT[room]}"
            )
        if parts[0] in OWNERS:
            assert str(inside).startswith(OWNERS[parts[0]]) or (
                inside.parts[0] == "tools" and inside.stem in MEASURE
            ), f"{inside} names {parts[0]}"


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if p.relative_to(PACKAGE).parts[0] in ("config", "submit")],
    ids=lambda p: p.name,
)
def test_config_and_submit_never_import_torch(path):
    assert not [
        module for module, _ in imported(path) if module.split(".")[0] in ("torch", "torchvision", "timm")
    ]


def test_help_of_every_verb_loads_nothing_heavy():
    heavy = (
        "torch",
        "torchvision",
        "timm",
        "deepspeed",
        "nvidia",
        "matplotlib",
        "webdataset",
        "submitit",
        "tensorboard",
    )
    code = (
        "import sys, importlib, argparse\n"
        "from dattrain.cli import VERBS\n"
        "for module, _ in VERBS.values():\n"
        "    importlib.import_module(module).add_arguments(argparse.ArgumentParser())\n"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
