"""Before the first update and after the last: what is refused, what is left, what is said, and that it works as it is typed."""

import contextlib
import json
import os
import re
import shlex
import sys
import time
from pathlib import Path

import pytest
import warm

sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from fashion_images import image_folder
from train_worker import recipe, rows

SETTINGS = ["train.precision=fp32", "checkpoint.every_steps=2", "checkpoint.keep_last=5", "train.ema_decay=0"]
DATA = ["data.train=photos/train", "data.val=photos/val"]


def dattrain(folder, *arguments):
    command = [sys.executable, "-m", "dattrain", *map(str, arguments)]
    return warm.run(command, capture_output=True, text=True, cwd=folder, timeout=300)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working folder with a recipe and pictures, named by relative paths; two updates are an epoch."""
    folder = tmp_path_factory.mktemp("hour")
    image_folder(folder / "photos/train", 64)
    image_folder(folder / "photos/val", 20, 64)
    recipe(folder)
    return folder


@pytest.fixture(scope="module")
def trained(home):
    """A run of three epochs, evaluated after each, and what it printed."""
    done = dattrain(home, "train", "recipe.yaml", *DATA, *SETTINGS, "--run", "runs/a")
    assert done.returncode == 0, done.stderr
    return home / "runs" / "a", done.stdout.splitlines()


def test_first_and_last_lines_name_the_run_folder_and_the_commands_work_as_typed(home, trained):
    _, lines = trained
    assert lines[0] == lines[-1] == "run folder: runs/a"
    assert any(
        line.startswith("finished at step 6 of 6 in 0:") and "train.max_steps=6" in line for line in lines
    )
    assert any(line.startswith("top1: best ") and "at step" in line for line in lines)
    following = [shlex.split(line) for line in lines[lines.index("next:") + 1 : -1]]
    assert [words[1] for words in following] == ["eval", "predict", "report", "export"]
    for words in following:
        if words[1] != "report":
            done = dattrain(home, *words[1:])
            assert done.returncode == 0, done.stderr


def test_a_run_begun_by_relative_paths_is_used_from_anywhere(trained, tmp_path):
    run, _ = trained
    done = dattrain(tmp_path, "eval", run, "--json", "report.json")
    assert done.returncode == 0, done.stderr
    last = rows(run, "top1")[-1]
    assert json.loads((tmp_path / "report.json").read_text())["top1"] == pytest.approx(last["top1"])
    done = dattrain(tmp_path, "train", run, "train.max_steps=7")
    assert done.returncode == 0 and rows(run)[-1]["step"] == 7, done.stderr
    done = dattrain(tmp_path, "train", run, "train.max_steps=null", "schedule.epochs=1")
    assert (
        "finished at step 7 of 7" in done.stdout
        and "(nothing was left to do: schedule.epochs=1 ends at step 2)" in done.stdout
    )


def test_every_place_takes_run_at_best_and_says_where_a_better_one_is(home, trained, tmp_path):
    run, _ = trained
    noted = run / "checkpoints" / "step_00000002" / "metrics.json"
    assert json.loads(noted.read_text())["top1"] == rows(run, "top1")[0]["top1"]
    noted.write_text('{"top1": 99.0}')
    done = dattrain(home, "eval", "runs/a")
    assert "step 2 has 99: runs/a@best" in done.stderr, done.stderr
    picture = next((home / "photos/val").rglob("*.png"))
    for words in (
        ["eval", "runs/a@best"],
        ["predict", picture, "--checkpoint", "runs/a@2"],
        ["viz", "points", picture, "--checkpoint", "runs/a@best", "--out", tmp_path / "viz"],
        ["export", "runs/a@best", "--to", "safetensors", "--out", tmp_path / "best.safetensors"],
        ["ckpt", "inspect", "runs/a@best"],
        ["ckpt", "verify", "runs/a@2"],
    ):
        done = dattrain(home, *words)
        assert done.returncode == 0 and "@best" not in done.stderr, done.stderr
        assert words[0] != "eval" or "step 2)" in done.stdout
    done = dattrain(home, "train", "recipe.yaml", *DATA, *SETTINGS, "init.from=runs/a@best", "train.max_steps=1", "--run", "runs/f")  # fmt: skip
    assert done.returncode == 0 and "(step 2)" in done.stdout, done.stderr
    done = dattrain(home, "eval", "runs/a@3")
    assert done.returncode == 1 and "there are those of steps 2, 4, 6" in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.val=photos/none", "photos/none"),
        ("init.from=none.safetensors", "init.from="),
        ("init.from=recipe.yaml", "not a safetensors file"),
        ("model.num_classes=11", "model.num_classes"),
    ],
)
def test_what_is_refused_leaves_no_run_folder(home, change, message):
    done = dattrain(home, "train", "recipe.yaml", *DATA, *SETTINGS, change, "--run", "runs/refused")
    assert done.returncode in (1, 2) and message in done.stderr, done.stderr
    assert not (home / "runs" / "refused").exists()
    (home / "runs" / "kept").mkdir(parents=True, exist_ok=True)
    (home / "runs" / "kept" / "notes.txt").touch()
    dattrain(home, "train", "recipe.yaml", *DATA, *SETTINGS, change, "--run", "runs/kept")
    assert (home / "runs" / "kept" / "notes.txt").exists()


def test_a_start_that_is_refused_late_says_so_in_what_was_there(home):
    """Weights of nothing show when the model is built: the start is noted by then."""
    from safetensors.torch import save_file
    from torch import zeros

    save_file({"nothing": zeros(1)}, home / "nothing.safetensors")
    run = home / "runs" / "late"
    (run / "logs").mkdir(parents=True)
    (run / "logs" / "old.log").touch()
    os.utime(run / "logs" / "old.log", (time.time() - 60,) * 2)
    settings = [*DATA, *SETTINGS, "init.from=nothing.safetensors"]
    done = dattrain(home, "train", "recipe.yaml", *settings, "--run", run)
    assert done.returncode in (1, 2) and "nothing.safetensors" in done.stderr, done.stderr
    assert (run / "logs" / "old.log").exists()
    found = json.loads(dattrain(home, "status", run, "--json").stdout)
    assert found["state"] == "failed" and "nothing.safetensors" in found["why"], found


def test_an_evaluation_that_fails_loses_no_epoch_and_is_made_up_for(home):
    """The header can be listed and read; that the picture cannot be decoded shows in the evaluation alone."""
    bad = next((home / "photos/val").rglob("*.png"))
    content = bad.read_bytes()
    bad.write_bytes(content[:60])
    run = home / "runs" / "broken"
    try:
        done = dattrain(home, "train", "recipe.yaml", *DATA, *SETTINGS, "--run", run)
        assert done.returncode == 1 and bad.name in done.stderr, done.stderr
    finally:
        bad.write_bytes(content)
    assert (run / "checkpoints/step_00000002/manifest.json").exists()
    end = json.loads((run / "env.json").read_text())["starts"][-1]["end"]
    assert end["status"] == "failed" and end["step"] == 2 and bad.name in end["why"]
    done = dattrain(home, "train", run)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(run, "top1")] == [2, 4, 6]
    assert (run / "checkpoints/step_00000002/metrics.json").exists()


def test_an_old_stop_file_stops_nothing_and_a_new_one_says_so(home):
    run = home / "runs" / "stopped"
    run.mkdir(parents=True)
    (run / "stop").touch()
    os.utime(run / "stop", (time.time() - 60,) * 2)
    done = dattrain(home, "train", "recipe.yaml", *DATA, *SETTINGS, "train.max_steps=1", "--run", run)
    assert (
        done.returncode == 0 and "finished at step 1" in done.stdout and "was left from before" in done.stdout
    )
    (run / "stop").touch()
    os.utime(run / "stop", (time.time() + 60,) * 2)
    done = dattrain(home, "train", run, "train.max_steps=6")
    assert done.returncode == 0 and not (run / "stop").exists()
    assert (
        f"(the file {run}/stop)" in done.stdout
        and "it goes on with: dattrain train runs/stopped" in done.stdout
    )
    ends = [start["end"]["status"] for start in json.loads((run / "env.json").read_text())["starts"]]
    assert ends == ["finished", "stopped"]


def test_on_a_terminal_no_line_steps_back(home):
    """The first live line is of step 1, and the log line of step 2 comes next: below that, step 1 must not come again."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "dattrain", "train", "recipe.yaml", *DATA, *SETTINGS]
    command += ["train.log_every=2", "train.max_steps=4", "--run", "runs/terminal"]
    with warm.Popen(command, cwd=home, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        # A terminal whose other side is closed is an error to whoever reads on.
        with contextlib.suppress(OSError):
            while part := os.read(ours, 1 << 16):
                shown += part
    os.close(ours)
    assert process.returncode == 0, shown
    steps = [int(number) for number in re.findall(rb"step (\d+)/4", shown)]
    assert steps[:2] == [1, 2] and steps == sorted(steps), shown
    assert b"loading torch" in shown and shown.index(b"loading torch") < shown.index(b"run folder")
