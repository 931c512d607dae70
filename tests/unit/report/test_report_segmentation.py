"""The page of a segmentation: its curves, its classes, and truth beside prediction."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from fashion_images import MAP_NAMES
from PIL import Image

from dattrain.cli import main as cli
from dattrain.observe import metrics
from dattrain.palette import palette
from dattrain.report import chart, page, segmented
from dattrain.report.extremes import extremes

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_the_page_holds_classes_and_maps(tmp_path, capsys, segmentation_run, scenes):
    found = page.collect(segmentation_run)
    (row,) = (r for r in metrics.read(segmentation_run) if "miou" in r)
    assert found["summary"]["best miou"] == f"{row['miou']:.2f} % at step 2"
    assert found["summary"]["evaluated on"].startswith("5 images of ")
    assert found["summary"]["model"] == "dat_atto with semantic_fpn, crops of 64 x 64, 11 classes"
    (panel,) = (each for each in found["panels"] if each["title"] == "Segmentation")
    assert {curve["name"]: curve["value"] for curve in panel["curves"]}["mIoU"] == [
        pytest.approx(row["miou"], rel=1e-4)
    ]
    assert found["confusion"] is None and found["images"] is None
    rows = {name: (colour, iou) for name, colour, iou, _, _ in found["classes"]["rows"]}
    assert rows["ground"][0] == "#" + bytes(palette(1)[0].tolist()).hex()
    # Of the averaged weights, as the images are.
    assert np.mean([iou for _, iou in rows.values()]) == pytest.approx(row["ema_miou"], abs=1e-3)
    assert sum(share for *_, share in found["classes"]["rows"]) == pytest.approx(1)
    (shown,) = (each for each in every(found["segmented"]) if each["name"].endswith(":2.png"))
    truth = Image.open(scenes / "annotations" / "validation" / "2.png")
    assert (segmented.numbers(shown["truth"]) == np.asarray(truth)).all()
    assert shown["legend"][0] == ["ground", rows["ground"][0]] and {n for n, _ in shown["legend"]} <= set(
        MAP_NAMES
    )
    below = segmented.images(
        json.loads((segmentation_run / "predictions.json").read_text()), ["background", *MAP_NAMES[1:]]
    )
    (map_,) = (each["truth"] for each in every(below) if each["name"] == shown["name"])
    assert ["background", None] in below["best"][0]["legend"]
    assert (picture(map_)[..., 3] == 0).sum() == (np.asarray(truth) == 0).sum()
    assert (picture(shown["truth"])[..., 3] == 255).all()
    drawn = chart.picture([segmentation_run], ["a"])
    labels = [label.get_text() for label in drawn.axes[0].get_yticklabels(which="both")]
    assert drawn.axes[0].get_yscale() == "log" and all(float(label) for label in labels if label)
    titles = [axes.get_title() for axes in drawn.axes]
    assert "Segmentation, %" in titles and "Accuracy, %" not in titles and len(titles) == 6


def every(images):
    return images["worst"] + images["best"]


def picture(url):
    """H x W x 4: as a browser draws it."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGBA"))


def test_what_an_evaluation_kept_can_be_made_anew(tmp_path, capsys, segmentation_run):
    run = tmp_path / "run"
    shutil.copytree(segmentation_run, run)
    kept = json.loads((run / "predictions.json").read_text())
    (run / "predictions.json").unlink()
    assert cli.main(["report", str(run), "--device", "cpu"]) == 0
    assert "no images" not in capsys.readouterr().out
    anew = json.loads((run / "predictions.json").read_text())
    assert anew["classes"] == kept["classes"] and anew["averaged"]
    assert [item["prediction"] for item in anew["worst"]] == [item["prediction"] for item in kept["worst"]]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")
def test_a_browser_draws_the_maps(tmp_path, segmentation_run):
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
               "--virtual-time-budget=5000", "--dump-dom", (segmentation_run / page.FILE).as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert 'data-drawn="yes"' in done.stdout, done.stderr[-2000:]
    shown = json.loads((segmentation_run / "predictions.json").read_text())
    assert len(re.findall(r'<img[^>]*class="map"', done.stdout)) == 2 * sum(
        map(len, extremes(shown).values())
    )
    assert "<h2>Classes</h2>" in done.stdout and "<h2>Most confused classes</h2>" not in done.stdout
