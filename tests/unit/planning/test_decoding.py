"""Cores for a rate: against the rates that were measured, and the page's tables against the function."""

from __future__ import annotations

from pathlib import Path

import pytest

from dattrain.planning.decoding import decoding, images_per_core

PAGE = Path(__file__).parents[3] / "docs/benchmarks/images-per-node.md"


def tables() -> dict[str, list[list[str]]]:
    """The page's tables by their first column's header: rows of cells."""
    found: dict[str, list[list[str]]] = {}
    rows = None
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            rows = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if rows is None:
            rows = found[cells[0]] = []
        elif not cells[0].startswith("---"):
            rows.append(cells)
    return found


def number(cell: str) -> float:
    return float(cell.replace(",", ""))


def test_a_core_makes_what_was_measured():
    rows = tables()["crop"]
    assert len(rows) == 4
    for crop, randaugment, rate, _ in rows:
        side = int(crop)
        computed = images_per_core((side, side), randaugment=randaugment == "yes")
        assert computed == pytest.approx(number(rate), rel=0.01)


def test_the_page_says_what_the_function_does():
    rows = tables()["images/s of a device"]
    assert len(rows) == 4
    for rate, *cores, workers in rows:
        for devices, cell in zip((1, 4, 8), cores):
            found = decoding(number(rate) * devices, (224, 224), nodes=1, world=devices, randaugment=True)
            assert found.cores_per_node == pytest.approx(number(cell), abs=0.06)
            assert found.workers == int(workers)
    for cores, *rates in tables()["cores"]:
        for devices, cell in zip((1, 1, 4, 8), rates):
            made = int(cores) * images_per_core((224, 224), randaugment=True) / devices
            assert made == pytest.approx(number(cell), rel=0.01)


def test_nodes_share_and_no_rank_goes_without():
    found = decoding(4 * 5000.0, (224, 224), nodes=4, world=32, randaugment=False)
    assert found.cores_per_node == pytest.approx(5000 / found.images_per_s_of_core)
    assert found.workers == 1
