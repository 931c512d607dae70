"""Own images by the commands of the pages, as they stand there; restarts; and what is refused."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "unit"))
# What makes minutes of the pages' commands: fewer updates, and no process for the data.
QUICK = ["train.max_steps=2", "data.workers=0"]
SCREEN = ("images", "classes", "sizes", "model", "batch", "rate", "device", "run", "why")


def dattrain(cwd, *words, code=0, **variables):
    done = warm.run(
        [sys.executable, "-m", "dattrain", *map(str, words)],
        cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == code, (
        f"{shlex.join(map(str, words))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done.stdout + done.stderr


@pytest.fixture
def home(tmp_path):
    """A folder with photographs of two kinds, of twenty each and copies of none."""
    from fashion_images import image_folder

    image_folder(tmp_path / "photos", 40, names=("cat", "dog") * 5)
    return tmp_path


def page(name):
    text = (ROOT / "docs" / name).read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


def follow(home, name):
    """Run a page's commands; returns what each printed."""
    said = []
    for words in page(name):
        assert words[0] == "dattrain"
        quick = QUICK if words[1] in ("train", "finetune") and "train.fast_dev_run=true" not in words else []
        said.append(dattrain(home, *words[1:], *quick))
    return said


def test_own_images_in_five_minutes(home):
    said = follow(home, "own_images.md")
    assert re.findall(r"^(\w+) {2,}", said[0], re.MULTILINE)[: len(SCREEN)] == list(SCREEN)
    assert said[0].index("classes  2: cat") < said[0].index("step 2/")
    assert "a fine-tune is far better, `dattrain finetune WEIGHTS --data photos`" in said[0]
    listed = [json.loads((home / f"runs/photos/{part}.images.json").read_text()) for part in ("train", "val")]
    train, val = ({f for files in each["classes"].values() for f in files} for each in listed)
    assert len(train) + len(val) == 40 and not train & val and len(val) == 4
    assert "4 images" in said[1] and said[2].count("%  cat") == said[2].count("%  dog") > 0
    tried = home / "runs" / "try"
    assert "two updates, one evaluation and one save" in said[3]
    assert [path.name for path in (tried / "checkpoints").glob("step_*")] == ["step_00000002"]
    rows = [json.loads(line) for line in (tried / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2] and sum(
        "top1" in row for row in rows
    ) == 1
    assert "dat_atto at 32 px" in said[4] and "train.micro_batch=64 is an upper bound: 32" in said[4]
    recipe = (home / "mine" / "recipe.yaml").read_text()
    values = [line for line in recipe.splitlines() if re.match(r" +\w+: \S", line)]
    assert len(values) > 15 and all("  # " in line for line in values)
    assert yaml.safe_load((home / "runs/mine/config.yaml").read_text())["optim"]["lr"] == 5e-4
    assert "exists; choose another DIR" in dattrain(home, "init", "mine", "--data", "photos", code=1)
    assert (home / "mine" / "recipe.yaml").read_text() == recipe


def test_a_restart_takes_what_is_written_and_chooses_nothing_anew(home):
    first = ["train", "--data", "photos", "--run", "runs/a", "data.workers=0"]
    dattrain(home, *first, "train.max_steps=1", "optim.lr=3e-4")
    before = (home / "runs/a/config.yaml").read_text()
    assert "lr: 0.0003  # given on the command line" in before and "epochs: 100.0  # 20,000 images" in before
    lists = (home / "runs/a/val.images.json").read_text()
    more = home / "photos" / "cat" / "more.png"
    more.write_bytes(next((home / "photos" / "dog").iterdir()).read_bytes())
    said = dattrain(home, *first, "train.max_steps=2")
    assert "nothing is chosen anew" in said and "resumed from" in said and "finished at step 2" in said
    assert (home / "runs/a/config.yaml").read_text() == before.replace(
        "max_steps: 1  # given on the command line", "max_steps: 2"
    )
    assert (home / "runs/a/val.images.json").read_text() == lists
    assert "100.0" in next(
        line
        for line in dattrain(home, "config", "show", "runs/a").splitlines()
        if "20,000 images seen" in line
    )
    assert "`dattrain finetune runs/a --data photos`" in dattrain(
        home, "train", "runs/a", "--data", "photos", code=2
    )
    (home / "others" / "cat").mkdir(parents=True)
    refused = dattrain(home, "train", "--data", "others", "--run", "runs/a", code=2)
    assert f"is a run on {home / 'photos'}, not on others" in refused


def test_a_released_dat_on_my_classes(home):
    with np.load(ROOT / "tests/assets/models/dat_cvpr_small.npz") as file:  # of the authors' code
        state = {n.removeprefix("state/"): torch.from_numpy(file[n]) for n in file.files if n[:6] == "state/"}
        config = {"MODEL": {"TYPE": "dat", "DAT": json.loads(str(file["config"]))}}
    torch.save({"model": state, "max_accuracy": 82.0, "config": config}, home / "dat_tiny_in1k_224.pth")
    said = follow(home, "finetune_released.md")
    assert "every tensor survives the way to our names and back" in said[0]
    assert re.search(r"new +head.fc.weight +2 x 128, drawn", said[0]) and "photos" in said[0]
    config = yaml.safe_load((home / "runs/tuned/config.yaml").read_text())
    assert config["init"]["from"] == str(home / "runs/tuned/init.safetensors")
    assert (config["model"]["img_size"], config["init"]["head"]) == (64, "new")
    assert config["model"]["overrides"]["dims"] == [16, 32, 64, 128]
    assert "resized" in said[3] and "288" in said[3]
    assert "2 of 2 classes have a row in the old head" in (home / "runs/again/config.yaml").read_text()
    (home / "dat_tiny_in1k_224.pth").unlink()
    dattrain(home, "train", "runs/tuned")  # the run has what it started from
    lost = dattrain(home, "finetune", "dat_tiny_in1k_224.pth", "--data", "photos", code=1)
    assert "https://github.com/LeapLabTHU/DAT" in lost and "no weights of dat_tiny are shipped" in lost


def test_splits_that_are_there_two_ranks_and_a_recipe_behind_the_option(home):
    (home / "set" / "train").mkdir(parents=True)
    (home / "photos").rename(home / "set" / "train" / "x")
    for name in ("cat", "dog"):
        (home / "set" / "train" / "x" / name).rename(home / "set" / "train" / name)
        (home / "set" / "valid" / name).mkdir(parents=True)
        image = next((home / "set" / "train" / name).iterdir())
        image.rename(home / "set" / "valid" / name / image.name)
    (home / "set" / "train" / "x").rmdir()
    said = dattrain(
        home,
        "train",
        "--data",
        "set",
        "demo/pretrain",
        "train.global_batch=12",
        *QUICK,
        "--run",
        "r",
        "--nproc",
        2,
    )
    assert "38 to train on, 2 to evaluate on" in said and "12 (2 device(s), 6 at a time" in said
    config = yaml.safe_load((home / "r/config.yaml").read_text())
    assert config["data"]["val"] == str(home / "set" / "valid") and config["model"]["num_classes"] == 2
    assert config["train"]["micro_batch"] == 64, "the recipe's, which is a bound"


def test_what_does_not_go_is_refused_and_leaves_nothing(home):
    def refused(*words, code=2, **variables):
        return dattrain(home, "train", *words, code=code, **variables)

    assert "images by --data FOLDER" in refused()
    assert "must be at least 1" in refused("--data", "photos", "--nproc", "0")
    assert "no such folder" in refused("--data", "fotos", code=1)
    assert "set model.num_classes=2" in refused("--data", "photos", "model.num_classes=5")
    assert "fewer than one train.global_batch=500" in refused("--data", "photos", "train.global_batch=500")
    assert "did you mean schedule.epochs" in refused("--data", "photos", "schedule.epoch=3")
    assert "schedule.epochs" in refused("--data", "photos", "schedule.epochs=many")
    assert "choose another --run" in refused("--data", "photos", "--run", "photos")
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    assert "use --nproc N instead, or let `dattrain init" in refused(
        "--data", "photos", "--run", "r", **ranks
    )
    (home / "photos" / "cat" / "broken.jpg").write_bytes(b"no picture")
    assert "broken.jpg" in refused("--data", "photos", code=1)
    assert sorted(path.name for path in home.iterdir()) == ["photos"]
    said = dattrain(
        home,
        "train",
        "--data",
        "photos",
        "--run",
        "r",
        "data.on_bad=skip",
        "train.fast_dev_run=true",
        "data.workers=0",
    )
    assert "finished at step 2" in said


def test_a_moved_run_keeps_its_own_images_whatever_has_its_name_now(home):
    quick = ["train.max_steps=1", "data.workers=0", "model.img_size=32"]
    dattrain(home, "train", "--data", "photos", "--run", "runs/a", *quick)
    (home / "runs" / "a").rename(home / "elsewhere")
    # The same names the other way round, by a run of the same name.
    shutil.copytree(home / "photos" / "cat", home / "swapped" / "dog")
    shutil.copytree(home / "photos" / "dog", home / "swapped" / "cat")
    dattrain(home, "train", "--data", "swapped", "--run", "runs/a", *quick)
    said = dattrain(home, "eval", "elsewhere")
    assert "elsewhere/val.images.json: 4 images" in said
    assert "resumed from" in dattrain(home, "train", "elsewhere", "train.max_steps=2")
