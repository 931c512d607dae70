"""What one does with a run once it is trained: evaluate, compare, predict, draw, export; all from the run folder."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

import huggingface_hub
import pytest
import warm

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from fashion_images import NAMES, image_folder

from dattrain.cli import main as cli
from dattrain.pretrained.weights import load_model

DEMO = Path(__file__).parents[2] / "configs" / "demo" / "pretrain.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Six updates on 300 images, with averaged weights."""
    root = tmp_path_factory.mktemp("run")
    for split, count, start in (("train", 300, 1000), ("val", 60, 0)):
        folder = image_folder(root / split, count, start)
        command = ["data", "pack", str(folder), str(root / "shards" / split), "--split", split]
        assert cli.main([*command, "--per-shard", "100", "--jobs", "1"]) == 0
    overrides = {
        "data.train": root / "shards/train",
        "data.val": root / "shards/val",
        "train.max_steps": 6,
        "train.ema_decay": 0.9,
        "train.global_batch": 32,
        "train.micro_batch": 32,
        "train.activation_checkpointing": "none",
        "schedule.warmup_epochs": 0.5,
    }
    command = [f"{key}={value}" for key, value in overrides.items()]
    train = [sys.executable, "-m", "dattrain", "train", str(DEMO), *command, "--run", str(root / "run")]
    assert warm.run(train).returncode == 0
    return root / "run"


def logged(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(row for row in reversed(rows) if "top1" in row)


def test_eval_gives_what_the_trainer_logged(run, tmp_path):
    last = logged(run)
    report = tmp_path / "report.json"
    for flag, top1, loss in (("--ema", "ema_top1", "ema_loss"), ("--no-ema", "top1", "eval_loss")):
        assert cli.main(["eval", str(run), flag, "--workers", "0", "--json", str(report)]) == 0
        figures = json.loads(report.read_text())
        assert figures["images"] == 60
        # The trainer evaluates under bf16 autocast: one image of 60 may fall on the other side.
        assert figures["top1"] == pytest.approx(last[top1], abs=100 / 60 + 1e-6)
        assert figures["loss"] == pytest.approx(last[loss], rel=0.02)
    assert "EMA" not in figures["source"]


def test_averaged_weights_are_the_default_and_checkpoints_can_be_named(run, tmp_path, capsys):
    step = sorted((run / "checkpoints").glob("step_*"))[-1]
    assert cli.main(["eval", str(step), "--workers", "0", "--compare", str(run)]) == 0
    out = capsys.readouterr().out
    assert "step 6, EMA" in out and "+0.00 (+0.00 to +0.00)" in out


def test_a_training_ends_with_a_page_with_its_images_and_their_sampling_points(run, tmp_path, capsys):
    (shown,) = page_of(run / "report.html")["runs"]
    assert [attempt["how"] for attempt in shown["attempts"]] == ["finished"]
    assert shown["confusion"]["images"] == 60
    assert shown["confusion"]["wrong"] == round(60 - 0.6 * logged(run)["ema_top1"])
    assert {item["label"] for item in shown["images"]["best"]} <= set(NAMES)
    (block, _) = shown["images"]["worst"][0]["points"]
    assert block["label"].startswith("stage 3") and [len(group) for group in block["groups"]] == [4, 4]
    assert (run / "results.png").is_file()
    # The training has shown what an evaluation of its weights shows.
    kept = json.loads((run / "predictions.json").read_text())
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "checkpoints", "classes.json"):
        (copy / name).symlink_to(run / name)
    assert cli.main(["report", str(copy), "--device", "cpu"]) == 0
    anew = json.loads((copy / "predictions.json").read_text())
    assert anew["averaged"] and anew["step"] == 6 and anew["pairs"] == kept["pairs"]
    assert [item["name"] for item in anew["worst"]] == [item["name"] for item in kept["worst"]]
    assert "no images" not in capsys.readouterr().out


def page_of(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.DOTALL)[1])


def test_predictions_have_the_names_of_the_class_folders(run, capsys):
    image = next((run.parent / "val").glob("*/*.png"))
    assert cli.main(["predict", str(image), "--checkpoint", str(run), "--topk", "10"]) == 0
    assert {line.split("%")[1].strip() for line in capsys.readouterr().out.splitlines()[1:]} == set(NAMES)


def test_evaluation_asks_the_run_for_its_classes_by_name(run, tmp_path, capsys):
    assert json.loads((run / "classes.json").read_text()) == sorted(NAMES)
    report = tmp_path / "report.json"
    classes = {}
    for name in sorted(NAMES)[-2:]:
        (tmp_path / "some").mkdir(exist_ok=True)
        (tmp_path / "some" / name).symlink_to(run.parent / "val" / name)
    for folder in (run.parent / "val", tmp_path / "some"):
        command = [
            "eval",
            str(run),
            "--data",
            str(folder),
            "--workers",
            "0",
            "--csv",
            str(tmp_path / folder.name),
        ]
        assert cli.main([*command, "--json", str(report)]) == 0
        with open(tmp_path / folder.name / "per_class.csv", newline="") as file:
            found = [row for row in csv.DictReader(file) if int(row["images"])]
        classes[folder.name] = {row["name"]: (row["images"], row["top1"], row["top5"]) for row in found}
    assert set(classes["some"]) == set(sorted(NAMES)[-2:])
    assert all(classes["val"][name] == row for name, row in classes["some"].items())
    (tmp_path / "some" / "zebra").symlink_to(run.parent / "val" / NAMES[0])
    assert cli.main(["eval", str(run), "--data", str(tmp_path / "some"), "--workers", "0"]) == 1
    assert "'zebra' is no class of the network" in capsys.readouterr().err


def test_pictures_and_exports_of_a_run(run, tmp_path):
    image = next((run.parent / "val").glob("*/*.png"))
    out = tmp_path / "viz"
    assert (
        cli.main(
            ["viz", "points", str(image), "--checkpoint", str(run), "--img-size", "96", "--out", str(out)]
        )
        == 0
    )
    assert (out / "points.html").exists()
    assert cli.main(["export", str(run), "--to", "timm", "--out", str(tmp_path / "timm")]) == 0
    report = tmp_path / "report.json"
    command = ["eval", str(tmp_path / "timm"), "--data", str(run.parent / "shards/val"), "--workers", "0"]
    assert cli.main([*command, "--json", str(report)]) == 0
    assert json.loads(report.read_text())["top1"] == pytest.approx(
        logged(run)["ema_top1"], abs=100 / 60 + 1e-6
    )


def test_a_models_card_says_how_it_was_trained_and_how_good_it_is(run, tmp_path):
    out = tmp_path / "mine"
    assert cli.main(["export", str(run), "--to", "hub", str(out)]) == 0
    card = huggingface_hub.ModelCard.load(out / "README.md")
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values["top-1 accuracy"] == pytest.approx(logged(run)["ema_top1"], abs=1e-3)
    assert "- length: 6 updates" in card.text and f"- evaluated on: {run.parent.name}/shards/val" in card.text
    assert str(run.parent) not in card.text  # nobody learns where it lay


def test_names_of_classes_travel_with_a_checkpoint(run, tmp_path):
    (tmp_path / "config.yaml").symlink_to(run / "config.yaml")
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    assert load_model(tmp_path)[1].classes == tuple(sorted(NAMES))


def test_a_checkpoint_without_its_config_says_so(run, tmp_path, capsys):
    import shutil

    shutil.copytree(run / "checkpoints", tmp_path / "elsewhere" / "checkpoints")
    assert cli.main(["predict", "x.png", "--checkpoint", str(tmp_path / "elsewhere")]) == 1
    capsys.readouterr()
    assert cli.main(["eval", str(tmp_path / "elsewhere"), "--data", "x"]) == 1
    assert "config.yaml" in capsys.readouterr().err
