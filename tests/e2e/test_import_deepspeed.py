"""Going on from a checkpoint that DeepSpeed wrote, by the commands that a person types."""

import shutil
import sys
from pathlib import Path

import pytest
import warm

sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))
from state_ranks import assert_same, finished, spawn, states
from train_worker import curve, pack, recipe

from dattrain.state.format import checkpoint

HERE = Path(__file__).parent
SETTINGS = ["train.precision=fp32", "train.ema_decay=0", "train.max_steps=4", "checkpoint.every_steps=2"]


def dattrain(*arguments):
    command = [sys.executable, "-m", "dattrain", *map(str, arguments)]
    done = warm.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.full), 3])
def test_the_imported_run_ends_as_the_one_that_was_never_moved(tmp_path, stage):
    data = pack(tmp_path)
    run, moved, theirs = tmp_path / "run", tmp_path / "moved", tmp_path / "theirs"
    dattrain("train", recipe(tmp_path), *data, *SETTINGS, f"zero.stage={stage}", "--run", run)
    halfway = run / "checkpoints" / "step_00000002"
    finished(spawn(1, [str(HERE / "import_deepspeed.py"), str(run), str(halfway), str(theirs)]))
    moved.mkdir()
    shutil.copy(run / "config.yaml", moved)
    samples = checkpoint.check(halfway).samples_seen
    dattrain("ckpt", "import", theirs, moved, "--samples-seen", samples)
    dattrain("train", moved)
    assert curve(moved) == curve(run)[2:]
    assert_same(states(moved, 4), states(run, 4))
