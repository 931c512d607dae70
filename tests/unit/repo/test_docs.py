"""Every relative link in the docs leads somewhere, and every command of ours that the docs show has verbs and options that exist."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from dattrain.cli.bench import SUBVERBS
from dattrain.cli.main import VERBS

ROOT = Path(__file__).parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "launch").rglob("*.md")])


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for target in targets:
        if re.match(r"[a-z]+://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target} leads nowhere"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}: no such heading"


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```(?:sh|bash|console|text)?\n(.*?)```", page.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(dattrain [^`\n]+)`", page.read_text())
    return [
        line.removeprefix("$ ").strip()
        for line in lines
        if line.removeprefix("$ ").strip().startswith("dattrain ")
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_have_verbs_and_options_that_exist(page):
    for command in commands(page):
        words = shlex.split(command, comments=True)
        verb = words[1]
        if not re.fullmatch(r"[a-z][a-z-]*", verb):
            continue
        assert verb in VERBS, f"{page.name}: {command}"
        parser = argparse.ArgumentParser(prog=verb)
        module = SUBVERBS[words[2]][0] if verb == "bench" and words[2:] else VERBS[verb][0]
        importlib.import_module(module).add_arguments(parser)
        known = options(parser)
        for word in words[2:]:
            if word.startswith("--"):
                assert word.split("=")[0] in known, f"{page.name}: {command}: no option {word}"


def options(parser: argparse.ArgumentParser) -> set[str]:
    found: set[str] = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                found |= options(sub)
    return found


def test_nobody_is_told_to_install_a_package_that_no_index_has():
    texts = [*PAGES, *(ROOT / "dattrain").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert [p for p in texts if re.search(r"pip install \S?dattrain", p.read_text())] == []


@pytest.mark.parametrize(
    "name", ["requirements.lock", "Makefile", "pyproject.toml", ".ci/run", ".github/workflows/ci.yml"]
)
def test_pins_name_no_registry(name):
    assert not re.search(r"https?://(?!github\.com)", (ROOT / name).read_text())
