"""``dattrain eval`` of segmentation networks: counted by hand, as the training counted, at scales and in windows, by two ranks."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import warm
from fashion_images import MAP_NAMES
from PIL import Image

from dattrain import api
from dattrain.cli import main as cli
from dattrain.errors import ConfigError, UserError
from dattrain.pretrained import weights
from dattrain.pretrained.segment import segment


def evaluated(tmp_path, *arguments):
    report = tmp_path / "report.json"
    assert cli.main(["eval", *map(str, arguments), "--workers", "0", "--json", str(report)]) == 0
    return json.loads(report.read_text())


def by_hand(model, cfg, scenes):
    """IoU of each class in percent, of what ``segment`` finds: sets of pixels, class by class."""
    files = sorted((scenes / "images" / "validation").iterdir())
    truths = [np.asarray(Image.open(scenes / "annotations" / "validation" / f.name)) for f in files]
    found = [each.classes for each in segment(model, cfg, files)]
    truth = np.concatenate([t.reshape(-1) for t in truths])
    predicted = np.concatenate([f.reshape(-1) for f in found])[truth != 255]
    truth = truth[truth != 255]
    ious = {}
    for number in range(cfg.num_classes):
        union = (truth == number) | (predicted == number)
        if union.any():
            ious[number] = 100 * ((truth == number) & (predicted == number)).sum() / union.sum()
    return ious, 100 * (truth == predicted).mean()


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ([], {}),
        (["--scales", "0.75,1.5", "--flip"], {"scales": (0.75, 1.5), "flip": True}),
        (["--mode", "slide"], {"mode": "slide"}),
    ],
    ids=["whole", "scales", "windows"],
)
def test_metrics_are_those_counted_by_hand(
    tmp_path, capsys, segmenter, dense_cfg, segmenter_file, scenes, options, changes
):
    val = scenes / "images" / "validation"
    report = evaluated(tmp_path, segmenter_file, "--data", val, *options, "--csv", tmp_path / "csv")
    changed = replace(dense_cfg, segmentation=replace(dense_cfg.segmentation, **changes))
    ious, accuracy = by_hand(segmenter, changed, scenes)
    assert len(ious) > 4  # or nothing would be told apart
    assert report["miou"] == pytest.approx(np.mean(list(ious.values())))
    assert report["aacc"] == pytest.approx(accuracy)
    assert {row["class"]: row["iou"] for row in report["per_class"]} == pytest.approx(ious, abs=1e-3)
    assert (report["images"], report["bad"]) == (5, 0)
    shown = capsys.readouterr().out
    assert f"mIoU {report['miou']:.2f} %" in shown and "  ground " in shown
    with open(tmp_path / "csv" / "per_class.csv", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert float(rows["ground"]["iou"]) == pytest.approx(ious[0], abs=1e-3) and set(rows) <= set(MAP_NAMES)


def test_a_run_is_evaluated_as_its_training_did(segmentation_run):
    (row,) = (r for r in map(json.loads, (segmentation_run / "metrics.jsonl").open()) if "miou" in r)
    own = api.evaluate(segmentation_run, workers=0, device="cpu")
    trained = api.evaluate(segmentation_run, workers=0, device="cpu", ema=False)
    for key, noted in (("miou", "miou"), ("macc", "macc"), ("aacc", "aacc"), ("loss", "loss")):
        assert own[key] == pytest.approx(row[f"ema_{noted}"], rel=1e-6), key
        assert trained[key] == pytest.approx(row[f"eval_{noted}" if key == "loss" else noted], rel=1e-6), key


def test_two_ranks_count_what_one_does(tmp_path, segmenter_file, scenes):
    data = ["--data", str(scenes / "images" / "validation")]
    one = evaluated(tmp_path, segmenter_file, *data)
    report = tmp_path / "two.json"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "dattrain",
    ]
    command += ["eval", str(segmenter_file), *data, "--workers", "0", "--json", str(report)]
    done = warm.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    two = json.loads(report.read_text())
    for key in ("miou", "macc", "aacc", "images"):  # counts of pixels
        assert two[key] == one[key], key
    assert two["loss"] == pytest.approx(one["loss"])
    assert done.stdout.count("mIoU") == 1


def test_an_image_without_its_map_is_an_error_or_left_out(tmp_path, segmenter_file, scenes):
    shutil.copytree(scenes, tmp_path / "set")
    (tmp_path / "set" / "annotations" / "validation" / "3.png").unlink()
    val = tmp_path / "set" / "images" / "validation"
    with pytest.raises(UserError, match=r"have no map.*3\.png.*--on-bad skip"):
        api.evaluate(segmenter_file, data=val, workers=0, device="cpu")
    report = api.evaluate(segmenter_file, data=val, workers=0, device="cpu", on_bad="skip")
    assert (report["images"], report["bad"]) == (4, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crops": 5}, "--crops has no meaning for a segmentation network"),
        ({"knn": 20}, "--knn has no meaning"),
        ({"resize": "squash"}, "--resize has no meaning"),
        ({"batch": 4}, "evaluates each image alone.* leave --batch 4 out"),
        ({"scales": ()}, "--scales .*one number above 0"),
        *(
            ({"scales": (1, scale)}, "--scales .*one number above 0 and up to 8")
            for scale in (0, -1, 50, math.nan, math.inf)
        ),
        ({"bias_table": "sample"}, "leave bias_table .--bias-table. out"),
        ({"bias_table": "resize"}, "leave bias_table .--bias-table. out"),
        ({"mode": "slide"}, "--mode slide needs the size of its windows"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, segmenter, dense_cfg, scenes, options, message):
    file = tmp_path / "w.safetensors"
    cfg = replace(dense_cfg, segmentation=replace(dense_cfg.segmentation, crop=None))
    weights.save(file, segmenter.state_dict(), cfg)
    with pytest.raises(ConfigError, match=message):
        api.evaluate(file, data=scenes / "images" / "validation", workers=0, device="cpu", **options)


def test_what_cannot_be_written_or_read_is_said_in_a_line_before_it_starts(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    for option, value, words in (
        ("--csv", tmp_path / "file", "is a file; name a folder"),
        ("--csv", tmp_path / "file" / "csv", f"{tmp_path / 'file'} is no folder"),
        ("--json", tmp_path, "is a folder; name a file"),
        ("--scales", "abc", "numbers with commas between"),
    ):
        assert cli.main(["eval", "nowhere", option, str(value)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{option} {value}: " in line and words in line
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert cli.main(["eval", "nowhere", "--csv", str(tmp_path / "new")]) == 2
    assert f"{tmp_path} cannot be written" in capsys.readouterr().err


def test_tasks_are_not_mixed(capsys, weights_file, segmenter_file, val_folder, scenes):
    with pytest.raises(ConfigError, match="--scales has no meaning for an image classifier"):
        api.evaluate(weights_file, data=val_folder, scales=(1, 2))
    with pytest.raises(UserError, match="task.kind=segmentation needs"):
        api.evaluate(segmenter_file, data=val_folder, workers=0, device="cpu")
    command = [
        "eval",
        str(weights_file),
        "--compare",
        str(segmenter_file),
        "--data",
        str(val_folder),
        "--workers",
        "0",
    ]
    assert cli.main(command) == 2
    assert "no metric in common" in capsys.readouterr().err
