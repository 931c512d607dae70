"""The import direction of the package, and who may name which library (docs/structure.md)."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[3] / "dattrain"
BASE = {"errors", "urls", "clock", "files", "palette", "drawing", "text"}
"""Modules of the top that import nothing of ours but each other."""
ENGINE = {"engine", "tasks", "state", "observe", "data", "models", "ops", "runtime", "config"}
MAY_IMPORT = {
    "config": set(),
    "ops": set(),
    "models": {"ops"},
    "runtime": {"config"},
    "data": {"config"},
    "state": {"runtime", "config"},
    "observe": {"runtime", "config"},
    "tasks": {"models", "data", "config"},
    "engine": {"tasks", "state", "observe", "data", "models", "ops", "runtime", "config"},
    "report": ENGINE | {"pretrained", "evaluation", "visualize"},
    "submit": {"report", "engine", "state", "observe", "data", "runtime", "config"},
    "pretrained": ENGINE,
    "evaluation": ENGINE | {"pretrained"},
    "visualize": ENGINE | {"pretrained"},
    "planning": ENGINE | {"submit"},
    "bench": ENGINE,
    "demo": ENGINE | {"pretrained", "visualize"},
    "cli": ENGINE
    | {"report", "submit", "pretrained", "evaluation", "visualize", "planning", "bench", "demo"},
}
OWNERS = {
    "deepspeed": ("engine/zero.py", "state/"),
    "nvidia": ("data/decode/", "bench/data_pipelines.py"),
    "submitit": ("submit/",),
    "triton": ("ops/",),
}
"""Who may name a library; the bench measures against DALI's own pipelines."""
TORCH_FREE = ("config/", "submit/", "state/format/", *(f"{name}.py" for name in sorted(BASE)))
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {
    ".".join(("dattrain", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in FILES
}


@cache
def imported(path: Path) -> list[str]:
    """Every module that a file imports, at import time or in a function; ``from a import b`` gives a and a.b."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    inside = path.relative_to(PACKAGE)
    package = inside.parts[0] if len(inside.parts) > 1 else None
    for module in imported(path):
        parts = module.split(".")
        if package and parts[0] == "dattrain" and len(parts) > 1 and parts[1] in MAY_IMPORT:
            assert parts[1] in MAY_IMPORT[package] | {package}, (
                f"{inside} imports {module}: {package} may import {sorted(MAY_IMPORT[package])}"
            )
        if parts[0] in OWNERS:
            assert str(inside).startswith(OWNERS[parts[0]]), f"{inside} names {parts[0]}"


def test_every_package_has_its_rule():
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages == set(MAY_IMPORT)
    assert {path.stem for path in PACKAGE.glob("*.py")} == BASE | {"__init__", "__main__", "api"}


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if str(p.relative_to(PACKAGE)).startswith(TORCH_FREE)],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_no_torch_where_a_login_node_looks(path):
    assert not {module.split(".")[0] for module in imported(path)} & {"torch", "torchvision", "timm"}


def test_no_file_imports_itself_through_others():
    """No circle: neither between folders nor inside one, nor through imports inside functions."""
    edges = {
        name: {module for module in imported(path) if module in MODULES and module != name}
        for name, path in MODULES.items()
    }
    # ``from dattrain.ops import x`` runs ops/__init__.py, whose own imports are not what the importer leans on.
    for name, path in MODULES.items():
        edges[name] = {
            module
            for module in edges[name]
            if not (MODULES[module].name == "__init__.py" and path.is_relative_to(MODULES[module].parent))
        }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for module in sorted(edges[name]):
                visit(module, (*above, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())


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
        "from dattrain.cli.main import VERBS\n"
        "for module, _ in VERBS.values():\n"
        "    importlib.import_module(module).add_arguments(argparse.ArgumentParser())\n"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
