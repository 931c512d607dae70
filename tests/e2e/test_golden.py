"""The demo recipe's first losses against ``tests/assets/losses/demo_pretrain.txt``, so that no change of numerics goes unseen.

After a change that is meant: ``PYTHONPATH=tests python tests/e2e/test_golden.py`` writes the file anew; say in the commit why it moved.
"""

import sys
import tempfile
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "assets" / "losses" / "demo_pretrain.txt"
UPDATES = 4
BOUND = 5e-3
"""Relative. The file was written in bf16, which shows the order of a machine's sums; another recipe or order differs far more."""


def dattrain(*arguments):
    done = warm.run(
        [sys.executable, "-m", "dattrain", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def train(folder):
    """(step, loss) of the recipe on two ranks."""
    import json

    source = ROOT / "dattrain" / "demo" / "t10k-images-idx3-ubyte.gz"
    dattrain("data", "pack", source, folder / "shards", "--holdout", 2000, "--per-shard", 500)
    run = folder / "run"
    shards = f"data.train={folder}/shards/train-*.tar"
    done = dattrain(
        "train",
        "configs/demo/pretrain.yaml",
        shards,
        f"train.max_steps={UPDATES}",
        "--run",
        run,
        "--nproc",
        2,
    )
    assert done.stderr == "loading torch, DeepSpeed ...\n"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def test_the_demo_recipe_loses_as_it_did(tmp_path):
    lines = [line.split() for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    expected = [(int(step), float(loss)) for step, loss in lines]
    found = train(tmp_path)
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=BOUND)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        losses = train(Path(folder))
    GOLDEN.write_text(
        "# step and loss of configs/demo/pretrain.yaml, 2 CPU ranks; written by tests/e2e/test_golden.py\n"
        + "".join(f"{step} {loss:.6f}\n" for step, loss in losses)
    )
