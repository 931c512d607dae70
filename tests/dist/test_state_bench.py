"""``dattrain bench checkpoint`` measures what it says: real ranks, real files; no figure of it decides anything here."""

from __future__ import annotations

import json
import os
import sys

import warm

from dattrain.cli.main import main


def test_bench_checkpoint(tmp_path):
    out = tmp_path / "report.json"
    words = [
        sys.executable,
        "-m",
        "dattrain",
        "bench",
        "checkpoint",
        "--parameters",
        "1e6",
        "--ranks",
        "2",
        "--load-ranks",
        "1",
        "--rounds",
        "2",
    ]
    words += ["--dir", str(tmp_path), "--json", str(out)]
    done = warm.run(words, env={**os.environ, "PYTHONWARNINGS": "ignore"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    cases = {(m["case"], m["name"]): m for m in report["measurements"]}
    assert [name for case, name in cases if case.startswith("step loop")] == [
        "blocking save",
        "background save",
    ]
    assert ("update beside it (2 ranks)", "background save") in cases
    assert cases[("state to disk (2 ranks)", "blocking save")]["items"] > 12.0
    assert ("load on 1 ranks", "load, checked") in cases
    assert all(m["wall"][0] > 0 for m in report["measurements"])
    text = done.stdout
    assert "Stall:" in text and "Bandwidth:" in text and "1 M parameters" in text
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"], "the folder is left as it was"
    assert main(["bench", "checkpoint", "--dir", str(tmp_path / "none")]) == 2
    assert main(["bench", "checkpoint", "--parameters", "1e15", "--dir", str(tmp_path)]) == 1
