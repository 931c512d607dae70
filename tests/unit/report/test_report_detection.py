"""The page of a detector: its curves, its classes, and truth beside what was found."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess

import numpy as np
import objects
import pytest
from PIL import Image

from dattrain.cli import main as cli
from dattrain.drawing import colour
from dattrain.observe import metrics
from dattrain.observe.sheet import TILE, sheet
from dattrain.report import chart, detected, page
from dattrain.report.extremes import extremes

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NAMES = tuple(objects.CATEGORIES.values())


@pytest.fixture(scope="module")
def kept(detector_file, object_set):
    """What an evaluation of Mask R-CNN keeps."""
    import torch

    from dattrain.evaluation import detection
    from dattrain.pretrained.recipe_model import dense_recipe
    from dattrain.pretrained.weights import load_model

    model, cfg = load_model(detector_file)
    config = dense_recipe(cfg)
    config = config.model_copy(update={"data": config.data.model_copy(update={"workers": 0})})
    val = str(object_set / "val.json")
    found = detection.run(config, model, cfg, val, torch.device("cpu")).predictions
    return {"step": 3, **found}


def test_the_page_holds_curves_and_classes(detection_run):
    found = page.collect(detection_run)
    (row,) = (r for r in metrics.read(detection_run) if "ap" in r)
    assert found["summary"]["best ap"] == f"{row['ap']:.2f} % at step 2"
    assert found["summary"]["model"] == "dat_atto with retinanet, shorter side 48 to 64, 3 classes"
    assert found["summary"]["evaluated on"].startswith("5 images of ")
    panels = {each["title"]: {curve["name"] for curve in each["curves"]} for each in found["panels"]}
    assert panels["Detection"] == {"AP", "AP50", "AP, averaged weights"}
    assert panels["Parts of the loss"] == {"classes", "boxes"}
    assert not any(found[key] for key in ("confusion", "images", "classes", "segmented"))
    table = found["objects"]
    assert table["heads"] == ["AP", "AP50"] and {row[0] for row in table["rows"]} <= set(NAMES)
    truth = json.loads((detection_run.parent / "run" / "predictions.json").read_text())["classes"]
    assert [row[2] for row in table["rows"]] == sorted((each["objects"] for each in truth), reverse=True)
    titles = [axes.get_title() for axes in chart.picture([detection_run], ["a"]).axes]
    assert "Detection, %" in titles and "Accuracy, %" not in titles and "Segmentation, %" not in titles


def test_images_hold_truth_and_what_was_found(kept, object_set):
    shown = detected.images(kept, NAMES)
    (item,) = (each for each in shown["worst"] + shown["best"] if each["name"].endswith("1024.png"))
    truth = json.loads((object_set / "val.json").read_text())
    own = [each for each in truth["annotations"] if each["image_id"] == 1024]
    boxes = [(box[:4], box[4], box[5]) for box in item["truth"]["boxes"]]
    assert [
        (each["bbox"], *known(each["category_id"])) for each in own
    ] == boxes  # no larger than it is shown
    assert not any(box[6] for box in item["truth"]["boxes"])
    texts = [box[5] for box in item["found"]["boxes"]]
    assert texts and all(re.fullmatch(r"(box|bar|disc) \d+%", text) for text in texts)
    masks = picture(item["truth"]["masks"])
    assert masks.shape[:2] == (item["height"], item["width"])
    colours = {tuple(each) for each in masks[masks[..., 3] > 0][:, :3].tolist()}
    assert colours == {colour(list(objects.CATEGORIES).index(each["category_id"])) for each in own}
    crowds = [
        box
        for each in shown["best"] + shown["worst"]
        for box in each["truth"]["boxes"]
        if box[5].endswith(", crowd")
    ]
    assert crowds and all(box[6] for box in crowds)
    assert detected.images({**kept, "worst": [], "best": []}, NAMES) is None
    assert detected.classes({"kind": "segmentation"}, NAMES) is None


def test_each_image_is_shown_once():
    few = [{"position": number} for number in (4, 0, 2)]
    assert extremes({"worst": few, "best": few[::-1]}) == {"worst": few[:2], "best": few[2:]}
    apart = {"worst": few[:1], "best": few[:0:-1]}
    assert extremes(apart) == apart


def known(category):
    number = list(objects.CATEGORIES).index(category)
    return "#" + bytes(colour(number)).hex(), NAMES[number]


def picture(url):
    """H x W x 4."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGBA"))


def test_the_sheet_of_loggers_shows_objects_beside_what_was_found(kept):
    drawn = sheet(kept["worst"][:3], NAMES)
    assert drawn.shape[1] == 4 * (2 * TILE + 8) and drawn.shape[0] > 2 * 2 * TILE
    (item, *_) = kept["worst"]
    plain = sheet([{**item, "truth": [], "found": [], "truth_masks": None, "found_masks": None}], NAMES)
    left, right = (
        sheet([item], NAMES)[:, part] != plain[:, part] for part in (slice(0, 328), slice(328, None))
    )
    assert left[: 2 * TILE].any() and right[: 2 * TILE].any()


def test_what_an_evaluation_kept_can_be_made_anew(tmp_path, detection_run):
    run = tmp_path / "run"
    shutil.copytree(detection_run, run)
    before = json.loads((run / "predictions.json").read_text())
    (run / "predictions.json").unlink()
    assert cli.main(["report", str(run), "--device", "cpu"]) == 0
    anew = json.loads((run / "predictions.json").read_text())
    assert anew["classes"] == before["classes"] and anew["averaged"]
    assert [item["name"] for item in anew["worst"]] == [item["name"] for item in before["worst"]]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")
def test_a_browser_draws_boxes_and_masks(tmp_path, detection_run, kept):
    run = tmp_path / "run"
    shutil.copytree(detection_run, run)
    (run / "predictions.json").write_text(json.dumps({**kept, "averaged": True}))
    page.write(run / page.FILE, [page.collect(run)])
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}",
               "--virtual-time-budget=5000", "--dump-dom", (run / page.FILE).as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert 'data-drawn="yes"' in done.stdout, done.stderr[-2000:]
    shown = [item for items in extremes(kept).values() for item in items]
    assert len(re.findall(r'<img[^>]*class="map"', done.stdout)) == 2 * len(shown)
    boxes = sum(len(item[key]) for item in shown for key in ("truth", "found"))
    assert len(re.findall(r'<rect[^>]*class="box"', done.stdout)) == boxes
    assert "<h2>Classes</h2>" in done.stdout and "mask AP50" in done.stdout
