"""The pure parts of ``python -m benchmarks.gpu``: verdicts, the table, what is skipped, what tools print, the search."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import bars, runner, tools, updates
from benchmarks.gpu.bars import Bar
from benchmarks.gpu.stages import STAGES

FAST, EXACT = Bar("a", "speed", "at least", 5, "times"), Bar("a", "wrong", "at most", 0)
KEY = {"commit": "c0ffee", "device": "GPU", "dry": False}


def figures(**values):
    return {name: {"value": value, "unit": ""} for name, value in values.items()}


@pytest.mark.parametrize(
    ("speed", "wrong", "verdicts", "status"),
    [
        (5.0, 0, ("met", "met"), "met"),
        (4.99, 0, ("missed", "met"), "missed"),
        (float("nan"), 0, ("missed", "met"), "missed"),
        (None, 0, ("not run", "met"), "not run"),
        ("fast", 1, ("not run", "missed"), "missed"),
    ],
)
def test_verdicts_and_the_status_of_a_stage(speed, wrong, verdicts, status):
    found = figures(speed=speed, wrong=wrong)
    assert tuple(bars.verdict(bar, found, dry=False) for bar in (FAST, EXACT)) == verdicts
    assert bars.status("a", found, dry=False, bars=(FAST, EXACT)) == status
    assert bars.status("another", found, dry=False, bars=(FAST, EXACT)) == "met"


def test_what_a_dry_run_measures_meets_nothing():
    found = figures(speed=100.0, wrong=0)
    assert bars.status("a", found, dry=True, bars=(FAST, EXACT)) == "not run"
    entry = {"stage": "a", "status": "not run", "reason": "walked on a CPU", "seconds": 1.0, "figures": found}
    text = bars.table([entry], dry=True, bars=(FAST, EXACT))
    assert (
        "DRY RUN" in text
        and "met" not in text.split("\n", 2)[2].replace("metric", "")
        and text.count("not run") == 3
    )


def test_the_table_sets_each_figure_beside_its_bar():
    entries = [
        {
            "stage": "a",
            "status": "missed",
            "reason": "",
            "seconds": 2.0,
            "figures": figures(speed=2.5, wrong=0, other="x"),
        },
        {"stage": "b", "status": "failed", "reason": "died of SIGSEGV", "seconds": 1.0, "figures": {}},
    ]
    lines = bars.table(
        entries, dry=False, bars=(FAST, EXACT, Bar("not asked for", "f", "at most", 1))
    ).splitlines()
    assert lines[1].split() == ["a", "speed", "2.5", "at", "least", "5", "times", "missed"]
    assert lines[2].split() == ["a", "wrong", "0", "at", "most", "0", "met"]
    assert "not asked for" not in "".join(lines)
    assert "b: failed (died of SIGSEGV), 1 s" in lines and "  other  x" in lines


def test_bars_are_of_stages_and_the_documented_ones():
    page = (Path(__file__).parents[3] / "docs" / "benchmarks" / "README.md").read_text()
    for bar in bars.BARS:
        assert bar.stage in {stage.name for stage in STAGES}
        assert f"| {bar.stage} | {bar.figure} | {bar.asked} |" in page


def test_what_ran_with_this_key_is_finished_however_it_went(tmp_path):
    path = tmp_path / "results.json"
    ran = [
        {"stage": "a", "status": "met", "ran": True, "key": KEY},
        {"stage": "b", "status": "failed", "ran": True, "key": KEY},
        runner.late(STAGES[0], KEY, 3.0),
        {"stage": "c", "status": "met", "ran": True, "key": {**KEY, "commit": "c0ffee and changes, code 12"}},
        {"stage": "d", "status": "met", "ran": True, "key": {**KEY, "dry": True}},
    ]
    runner.write(path, KEY, ran)
    assert list(runner.finished(runner.load(path), KEY)) == ["a", "b"]
    runner.put_aside(path, KEY)
    assert path.exists()
    runner.put_aside(path, {**KEY, "device": "another"})
    assert not path.exists() and json.loads((tmp_path / "results-1.json").read_text())["device"] == "GPU"
    path.write_text('{"stages": [{"st')  # cut off
    assert runner.load(path) == []
    runner.put_aside(path, KEY)
    assert (tmp_path / "results-2.json").exists()


def test_only_names_stages():
    assert [s.name for s in command.chosen(["core,facts", "dali"])] == ["facts", "core", "dali"]
    assert command.chosen(None) == list(STAGES)
    with pytest.raises(command.UserError, match="--only cores: no such stage; there are facts, kernels"):
        command.chosen(["cores"])


def test_changed_code_is_another_commit(tmp_path):
    (tmp_path / "dattrain").mkdir()
    (tmp_path / "dattrain" / "a.py").write_text("1")
    before = runner.digest(tmp_path)
    assert runner.digest(tmp_path) == before
    (tmp_path / "dattrain" / "b.py").write_text("")
    assert runner.digest(tmp_path) != before


@pytest.mark.parametrize("limit", [1, 63, 64, 100, 129, 1000, 5000])
def test_the_largest_micro_batch(limit):
    tried = []

    def fits(count):
        tried.append(count)
        return count <= limit

    found = updates.search(fits, first=64, grain=16, most=4096)
    assert found == (min(limit, 4096) // 32 * 32 if limit >= 64 else limit // 32 * 32)
    assert len(tried) == len(set(tried)) <= 13
    tried.clear()
    assert updates.search(fits, first=64, grain=16, most=4096, going=lambda: not tried) == (
        64 if limit >= 64 else 0
    )


NCU = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","_forward_kernel(a, b)","smsp__inst_executed.sum","inst","1,000"
"0","1","_forward_kernel(a, b)","smsp__issue_active.avg.pct_of_peak_sustained_active","%","40.5"
"1","1","_forward_kernel(a, b)","smsp__inst_executed.sum","inst","500"
"1","1","_forward_kernel(a, b)","smsp__issue_active.avg.pct_of_peak_sustained_active","%","20"
"2","1","_key_kernel","smsp__inst_executed.sum","inst","64"
"2","1","_key_kernel","something__else","inst","64"
"""


def test_what_nvidias_tools_print_is_read():
    kernels = tools.parse(NCU)
    assert kernels["_forward_kernel"] == {
        "smsp__inst_executed.sum": (1500.0, "inst"),
        "smsp__issue_active.avg.pct_of_peak_sustained_active": (40.5, "%"),
    }
    assert tools.instructions(kernels) == 32 * 1564
    assert tools.parse("==ERROR== no permission") == {}
    assert tools.memory_errors("...\n========= ERROR SUMMARY: 3 errors\n") == 3
    with pytest.raises(RuntimeError, match="no summary"):
        tools.memory_errors("Device not supported")
    assert tools.outcomes("...\n2 failed, 3 passed, 500 deselected in 12.3s\n") == {
        "failed": 2, "passed": 3, "deselected": 500,
    }  # fmt: skip
    assert tools.outcomes("no tests") == {}
