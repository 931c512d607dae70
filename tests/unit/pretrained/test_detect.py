"""The objects of people's own images: boxes and masks at the image's size, pictures, tables, COCO's format."""

from __future__ import annotations

import csv
import io
import json
import shutil

import numpy as np
import objects
import pytest
import torch
from PIL import Image

from dattrain import api
from dattrain.cli import main as cli
from dattrain.data.annotations import rle
from dattrain.drawing import colour
from dattrain.errors import ConfigError
from dattrain.pretrained import preprocess
from dattrain.pretrained.detect import Detection, detect
from dattrain.tasks.detection_inference import Objects

LOW = 0.2
"""A score that objects of several classes have."""


@pytest.fixture(scope="module")
def file(object_set):
    return object_set / "val" / "1024.png"


@pytest.fixture(scope="module")
def found(detector, detector_cfg, file) -> Detection:
    (one,) = detect(detector, detector_cfg, [file], score_threshold=LOW)
    assert len(one) > 5 and len(set(one.classes.tolist())) > 1
    return one


def test_boxes_are_the_networks_own_at_the_images_size(detector, detector_cfg, file, found):
    pixels = preprocess.read(file)
    height, width = pixels.shape[1:]
    prepared = preprocess.prepare(pixels, detector_cfg)
    size = prepared.shape[1:]
    x = preprocess.model_input(prepared, detector_cfg)
    assert x.shape[2] % 32 == x.shape[3] % 32 == 0 and (x[..., size[0] :, :] == 0).all()
    with torch.no_grad():
        (own,) = detector(x, [(size[0], size[1])])
    kept = own["scores"] >= LOW
    factors = np.array([width / size[1], height / size[0]] * 2)
    np.testing.assert_allclose(found.boxes, own["boxes"][kept].numpy() * factors, atol=0.05)
    np.testing.assert_allclose(found.scores, own["scores"][kept].numpy(), atol=1e-4)
    assert (np.diff(found.scores) <= 0).all() and (found.pixels == np.asarray(Image.open(file))).all()


def test_an_image_in_any_form_has_the_same_objects(tmp_path, detector, detector_cfg, file, found):
    photo = Image.open(file).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    pixels = np.asarray(photo)
    forms = [tmp_path / "turned.png", photo, pixels, torch.from_numpy(pixels.copy()).permute(2, 0, 1)]
    for each in detect(detector, detector_cfg, forms, score_threshold=LOW):
        assert (each.boxes == found.boxes).all() and (each.classes == found.classes).all()


def test_masks_lie_in_their_boxes(found):
    masks = found.masks
    assert masks is not None and masks.shape == (len(found), *found.pixels.shape[:2])
    for mask, (left, top, right, bottom), probability in zip(masks, found.boxes, found.probabilities):
        ys, xs = np.nonzero(mask)
        area = (bottom - top) * (right - left)
        if not len(ys):  # a sliver that holds no pixel's centre
            assert area < 32
            continue
        assert ys.min() + 0.5 >= top and ys.max() + 0.5 <= bottom
        assert xs.min() + 0.5 >= left and xs.max() + 0.5 <= right
        # The edge of the box cuts pixels.
        around = (bottom - top + right - left) / area
        assert mask.sum() / area == pytest.approx((probability >= 0.5).mean(), abs=0.05 + float(around))
    assert (found.covered() == masks.any(0)).all() and found.areas() == masks.sum((1, 2)).tolist()


def test_scores_below_the_networks_own_threshold_can_be_asked_for(detector, detector_cfg, file):
    counts = []
    for score in (0.0, 0.05, LOW, 0.99):
        (one,) = detect(detector, detector_cfg, [file], score_threshold=score)
        counts.append(len(one))
        assert (one.scores >= score).all()
    assert counts == sorted(counts, reverse=True) and counts[-1] == 0 and counts[0] == 100
    assert detector.score_threshold == 0.05
    assert repr(one) == f"Detection({one.pixels.shape[0]} x {one.pixels.shape[1]}: nothing)"
    assert one.masks.shape == (0, *one.pixels.shape[:2]) and (one.overlay() == one.pixels).all()


def test_a_box_that_was_clipped_to_nothing_is_no_object(monkeypatch, detector, detector_cfg, file):
    boxes = torch.tensor([[73, 2, 73, 30], [1, 2, 9, 30], [4, 0, 9, 0], [0, 0, 0, 0], [3.2, 4, 3.3, 5]])
    given = Objects(
        boxes.float(), torch.full((5,), 0.9), torch.zeros(5, dtype=torch.int64), torch.ones(5, 28, 28)
    )
    monkeypatch.setattr("dattrain.pretrained.detect.DetectionInference.__call__", lambda *_: given)
    (found,) = detect(detector, detector_cfg, [file])
    assert (found.boxes == boxes[[1, 4]].numpy()).all() and len(found.masks) == len(found) == 2


def test_pictures_tables_and_cocos_format(tmp_path, capsys, detector_file, file, found):
    out, table, content = tmp_path / "out", tmp_path / "o.csv", tmp_path / "o.json"
    (tmp_path / "bad.png").write_bytes(b"no image")
    command = [
        "predict",
        str(file),
        str(tmp_path / "bad.png"),
        "--checkpoint",
        str(detector_file),
        "--out",
        str(out),
    ]
    command += ["--score", str(LOW), "--csv", str(table), "--json", str(content), "--points"]
    assert cli.main(command) == 1
    shown = capsys.readouterr()
    assert "bad.png" in shown.err and f"{found.counts()}\n" in shown.out
    assert f"{len(found) - 5} more" in shown.out and f"{100 * found.scores[0]:6.2f} %  " in shown.out
    assert {path.name for path in out.iterdir()} == {"1024.png", "1024.points.png"}
    assert (np.asarray(Image.open(out / "1024.png")) == found.overlay(longest=640)).all()
    assert cli.main(command[:-1]) == 1 and cli.main(["predict", str(out / "1024.png"), *command[3:]]) == 2
    assert "is a picture that predict wrote" in capsys.readouterr().err
    with open(table, newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == len(found)
    for row, one in zip(rows, found.objects()):
        assert (row["name"], int(row["class"])) == (one.name, one.number)
        edges = [float(row[key]) for key in ("left", "top", "right", "bottom")]
        assert edges == pytest.approx(one.box, abs=0.01) and float(row["score"]) == pytest.approx(
            one.score, abs=1e-6
        )
    coco = json.loads(content.read_text())
    assert [each["name"] for each in coco["categories"]] == list(objects.CATEGORIES.values())
    (image,) = coco["images"]
    assert image["file_name"] == str(file) and (image["height"], image["width"]) == found.pixels.shape[:2]
    for row, number, mask, area in zip(coco["annotations"], found.classes, found.masks, found.areas()):
        assert row["category_id"] == number + 1 and row["area"] == area
        assert (rle.decode(rle.from_string(row["segmentation"]["counts"]), *mask.shape) == mask).all()


def test_categories_have_the_ids_of_the_training_set_while_it_is_there(tmp_path, capsys, detection_run, file):
    gone = tmp_path / "gone"
    shutil.copytree(detection_run, gone)
    config = (gone / "config.yaml").read_text()
    (gone / "config.yaml").write_text(config.replace("train.json", "elsewhere.json"))
    for run, ids, words in (
        (detection_run, list(objects.CATEGORIES), "train.json"),
        (gone, [1, 2, 3], "is not there"),
    ):
        content = tmp_path / "o.json"
        command = ["predict", str(file), "--checkpoint", str(run), "--out", str(tmp_path), "--score", "0"]
        assert cli.main([*command, "--json", str(content)]) == 0
        assert words in capsys.readouterr().out.splitlines()[-1]
        coco = json.loads(content.read_text())
        assert {each["id"]: each["name"] for each in coco["categories"]} == dict(
            zip(ids, objects.CATEGORIES.values())
        )
        assert {each["category_id"] for each in coco["annotations"]} <= set(ids)


def test_so_many_objects_at_most(capsys, tmp_path, detector_file, file, found):
    command = ["predict", str(file), "--checkpoint", str(detector_file), "--out", str(tmp_path)]
    assert cli.main([*command, "--score", str(LOW), "--topk", "3", "--csv", "-"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [float(row["score"]) for row in rows] == pytest.approx(found.scores[:3].tolist(), abs=1e-6)
    (one,) = api.predict(detector_file, file, score=LOW, topk=3, device="cpu")
    assert len(one) == len(one.masks) == 3
    (usual,) = api.predict(detector_file, file, device="cpu")
    assert len(usual) == (found.scores >= 0.3).sum()
    assert repr(usual).startswith(f"Detection({found.pixels.shape[0]} x {found.pixels.shape[1]}: bar ")


def test_boxes_alone_have_no_masks(detection_run, file):
    (one,) = api.predict(detection_run, file, score=0, device="cpu")
    assert one.masks is None and len(one) > 3
    left, top, right, bottom = one.boxes[0]
    assert one.areas()[0] == pytest.approx((right - left) * (bottom - top), abs=1e-2)
    (row, *_) = one.coco(7, [3, 7, 12])
    assert row["image_id"] == 7 and row["category_id"] in objects.CATEGORIES and "segmentation" not in row
    assert one.covered()[int((top + bottom) / 2), int((left + right) / 2)]
    drawn = one.overlay(text=False)
    y, x = min(int(np.ceil(bottom)) - 1, len(drawn) - 1), int((left + right) / 2)
    assert tuple(drawn[y, x]) in {colour(number) for number in range(3)}


def test_what_has_no_meaning_is_refused(tmp_path, capsys, detector_file, segmenter_file, file, atto, cfg):
    for weights, option, network in (
        (detector_file, ["--maps"], "a detector"),
        (detector_file, ["--batch", "2"], "a detector"),
        (segmenter_file, ["--score", "0.5"], "a segmentation network"),
        (segmenter_file, ["--points"], "a segmentation network"),
        (segmenter_file, ["--json", str(tmp_path / "x.json")], "a segmentation network"),
    ):
        assert cli.main(["predict", str(file), "--checkpoint", str(weights), *option]) == 2
        assert f"is {network}, for which {option[0]} has no meaning" in capsys.readouterr().err
    assert cli.main(["predict", str(file), "--checkpoint", str(detector_file), "--score", "2"]) == 2
    assert "--score 2: a score is from 0 to 1" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="score is for detectors, and this is a segmentation network"):
        api.predict(segmenter_file, file, score=0.5, device="cpu")
    with pytest.raises(ConfigError, match="is an image classifier, not a detector"):
        next(detect(atto, cfg, [file]))
