"""``dattrain eval`` of detectors: as COCO's own code counts, as the training counted, by two ranks; results in the file's ids."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sys

import objects
import pytest
import torch
import warm
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dattrain import api
from dattrain.cli import main as cli
from dattrain.data import detection_factory
from dattrain.errors import ConfigError, UserError
from dattrain.pretrained.pretrained_cfg import classes_of
from dattrain.pretrained.recipe_model import dense_recipe
from dattrain.pretrained.weights import load_model
from dattrain.tasks.coco_numbers import NAMES


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, detector_file, object_set):
    """What one process reports of Mask R-CNN, the folder with its files, and what it printed."""
    folder = tmp_path_factory.mktemp("evaluated")
    command = [
        "eval",
        str(detector_file),
        "--data",
        str(object_set / "val.json"),
        "--workers",
        "0",
        "--device",
        "cpu",
        "--boundary",
    ]
    command += [
        "--json",
        str(folder / "report.json"),
        "--csv",
        str(folder / "csv"),
        "--predictions",
        str(folder / "p.json"),
    ]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert cli.main(command) == 0
    return json.loads((folder / "report.json").read_text()), folder, shown.getvalue()


@pytest.mark.parametrize(("kind", "prefix"), [("bbox", ""), ("segm", "mask_")])
def test_the_predictions_file_gives_cocos_own_code_the_same_numbers(evaluated, object_set, kind, prefix):
    report, folder, _ = evaluated
    rows = json.loads((folder / "p.json").read_text())
    if kind == "segm":  # with a box there pycocotools takes its area, not the mask's
        rows = [{key: value for key, value in row.items() if key != "bbox"} for row in rows]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(object_set / "val.json"))
        evaluation = COCOeval(truth, truth.loadRes(rows), kind)
        evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    assert evaluation.stats[0] > 0
    for name, value in zip(NAMES, evaluation.stats):
        if value < 0:
            assert f"{prefix}{name}" not in report
        else:
            assert report[f"{prefix}{name}"] == pytest.approx(100 * value, abs=1e-6), name


def test_results_are_in_the_files_own_ids(evaluated):
    _, folder, _ = evaluated
    rows = json.loads((folder / "p.json").read_text())
    assert {row["category_id"] for row in rows} == set(objects.CATEGORIES)
    assert {row["image_id"] for row in rows} <= set(range(1024, 1029)) and len(rows) > 100
    assert all(set(row["segmentation"]) == {"size", "counts"} for row in rows)


def test_what_is_printed_and_the_table_of_classes(evaluated):
    report, folder, shown = evaluated
    assert (report["images"], report["bad"], report["classes"]) == (5, 0, 3)
    assert 0 <= report["boundary_ap50"] < report["mask_ap50"] and "masks by their outlines" in shown
    assert f"{report['ap']:.2f}" in shown and "box " in shown
    assert f"{folder / 'p.json'}: the results, in COCO's format" in shown
    with open(folder / "csv" / "per_class.csv", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(objects.CATEGORIES.values())
    aps = [float(row["ap"]) for row in rows.values() if row["ap"]]
    assert sum(aps) / len(aps) == pytest.approx(report["ap"], abs=1e-3)
    assert sum(int(row["found"]) for row in rows.values()) == len(json.loads((folder / "p.json").read_text()))


def test_a_run_is_evaluated_as_its_training_did(detection_run):
    (row,) = (r for r in map(json.loads, (detection_run / "metrics.jsonl").open()) if "ap" in r)
    own = api.evaluate(detection_run, workers=0, device="cpu")
    trained = api.evaluate(detection_run, workers=0, device="cpu", ema=False)
    assert row["ar100"] > 0 and row["ema_ar100"] > 0
    for key in ("ap", "ap50", "ar100", "ar_small"):
        assert own[key] == pytest.approx(row[f"ema_{key}"], rel=1e-6), key
        assert trained[key] == pytest.approx(row[key], rel=1e-6), key
    assert not any(key.startswith("mask_") for key in own)


def test_two_ranks_count_what_one_does(tmp_path, evaluated, detector_file, object_set):
    report, folder, _ = evaluated
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
    command += [
        "eval",
        str(detector_file),
        "--data",
        str(object_set / "val.json"),
        "--workers",
        "0",
        "--device",
        "cpu",
        "--boundary",
    ]
    command += ["--json", str(tmp_path / "two.json"), "--predictions", str(tmp_path / "p.json")]
    done = warm.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two.json").read_text())
    kept = [key for key in report if key.removeprefix("mask_").removeprefix("boundary_") in NAMES]
    assert {key: two[key] for key in kept} == {key: report[key] for key in kept} and len(kept) > 20
    assert (tmp_path / "p.json").read_text() == (folder / "p.json").read_text()


def test_one_object_without_mask_leaves_the_numbers_of_boxes(
    tmp_path, caplog, evaluated, detector_file, detector_cfg, object_set
):
    report, *_ = evaluated
    content = json.loads((object_set / "val.json").read_text())
    maskless = content["annotations"][-1]
    del maskless["segmentation"]
    (tmp_path / "val.json").write_text(json.dumps(content))
    (tmp_path / "val").symlink_to(object_set / "val")
    spec = str(tmp_path / "val.json")
    own = api.evaluate(detector_file, data=spec, workers=0, device="cpu")
    assert own["ap"] == pytest.approx(report["ap"]) and not any(key.startswith("mask_") for key in own)
    (said,) = (each.getMessage() for each in caplog.records if "no mask" in each.getMessage())
    assert "1 object with a box and no mask" in said and str(maskless["image_id"]) in said
    config = dense_recipe(detector_cfg)
    chosen_by_masks = config.model_copy(
        update={
            "data": config.data.model_copy(update={"val": spec}),
            "checkpoint": config.checkpoint.model_copy(update={"metric": "mask_ap"}),
        }
    )
    with pytest.raises(UserError, match="checkpoint.metric=mask_ap is of masks"):
        detection_factory.eval_loader(
            chosen_by_masks, classes_of(detector_cfg), rank=0, world=1, device=torch.device("cpu")
        )


def test_limits_of_the_run_can_be_changed(evaluated, detector_file, object_set):
    report, *_ = evaluated
    data = object_set / "val.json"
    few = api.evaluate(
        detector_file, data=data, workers=0, device="cpu", max_detections=2, score_threshold=0.3
    )
    assert (few["max_detections"], few["score_threshold"]) == (2, 0.3)
    assert (
        sum(row["found"] for row in few["per_class"]) <= 10 < sum(row["found"] for row in report["per_class"])
    )
    assert few["ar100"] < report["ar100"]
    assert load_model(detector_file)[0].max_detections == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crops": 5}, "--crops has no meaning for a detector"),
        ({"scales": (1, 2)}, "--scales has no meaning for a detector"),
        ({"flip": True}, "--flip has no meaning for a detector"),
        ({"batch": 4}, "a detector evaluates each image alone.* leave --batch 4 out"),
        ({"img_size": 96}, "is a detector, which takes images of any size"),
        ({"max_detections": 0}, "--max-detections 0 must be at least 1"),
        ({"score_threshold": 1.5}, "--score-threshold 1.5: a score is from 0 to 1"),
    ],
)
def test_what_does_not_go_together_is_refused(detector_file, object_set, options, message):
    with pytest.raises(ConfigError, match=message):
        api.evaluate(detector_file, data=object_set / "val.json", workers=0, device="cpu", **options)


def test_what_a_detector_alone_knows_is_refused(
    tmp_path,
    capsys,
    detection_run,
    detector_file,
    segmenter_file,
    weights_file,
    object_set,
    scenes,
    val_folder,
):
    with pytest.raises(ConfigError, match="--boundary is of masks, and retinanet gives boxes alone"):
        api.evaluate(detection_run, boundary=True, workers=0, device="cpu")
    with pytest.raises(ConfigError, match="--predictions has no meaning for a segmentation network"):
        api.evaluate(segmenter_file, data=scenes / "images" / "validation", predictions=tmp_path / "p.json")
    with pytest.raises(ConfigError, match="--boundary has no meaning for an image classifier"):
        api.evaluate(weights_file, data=val_folder, boundary=True)
    with pytest.raises(UserError, match="task.kind=detection needs"):
        api.evaluate(detector_file, data=val_folder, workers=0, device="cpu")
    command = [
        "eval",
        str(detector_file),
        "--compare",
        str(detection_run),
        "--data",
        str(object_set / "val.json"),
    ]
    assert cli.main([*command, "--predictions", str(tmp_path / "p.json")]) == 2
    assert "--predictions is one file" in capsys.readouterr().err


def test_detectors_beside_each_other(capsys, detection_run, detector_file, object_set):
    command = [
        "eval",
        str(detector_file),
        "--compare",
        str(detection_run),
        "--data",
        str(object_set / "val.json"),
    ]
    assert cli.main([*command, "--workers", "0", "--device", "cpu"]) == 0
    table = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert (
        table[0].split()[:6] == ["model", "size", "params", "FLOPs", "AP", "AP50"] and "mask AP50" in table[0]
    )
    assert len(table) == 3
