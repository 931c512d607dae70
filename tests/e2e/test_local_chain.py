"""A chain on this machine with real trainings: the first link ends early, the second starts from its weights."""

import sys
from pathlib import Path

import pytest
import warm

sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))
from train_worker import pack, recipe

CHAIN = """
name: two
stages:
  first: {config: recipe.yaml}
  second: {config: recipe.yaml, from: first, overrides: [train.max_steps=2]}
"""
FIRST = ["early_stopping_patience=1", "early_stopping_min_delta=200"]


@pytest.mark.full
def test_a_chain_on_this_machine_trains_link_after_link(tmp_path):
    data, _ = pack(tmp_path), recipe(tmp_path)
    (tmp_path / "chain.yaml").write_text(CHAIN)
    both = [*data, "train.precision=fp32", "eval.every_epochs=0.34"]
    words = [f"{stage}.{setting}" for stage in ("first", "second") for setting in both]
    words += [f"first.train.{setting}" for setting in FIRST]

    def dattrain(*arguments):
        command = [sys.executable, "-m", "dattrain", *arguments]
        return warm.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)

    done = dattrain("submit", "chain.yaml", "--cluster", "local", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "first: finished at step 2\nsecond: begins\nsecond: finished at step 2" in done.stdout
    assert "init.from=" in (tmp_path / "runs/two/second/logs/rank_0.log").read_text()
    shown = dattrain("status", "runs/two").stdout
    assert shown.count(" finished ") == 2 and "stopped early: top1 has not improved for 1 evaluation" in shown
