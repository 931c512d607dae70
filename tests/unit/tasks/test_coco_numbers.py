"""COCO's numbers: equal to pycocotools', on a random set with crowds, areas and ties."""

import contextlib
import io
import json
import sys

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dattrain.data.annotations import rle
from dattrain.data.annotations.instances import Instances
from dattrain.errors import UserError
from dattrain.tasks import coco_numbers
from dattrain.tasks.coco_numbers import NAMES, ImageResult

CLASSES = 3
IDS = [3, None, 20]
"""What a file calls the classes; it has not all of them."""


def blob(random, size, box):
    """An ellipse within a box (x, y, width, height): H x W bool."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    cx, cy = box[0] + box[2] / 2, box[1] + box[3] / 2
    return ((x - cx) / box[2]) ** 2 + ((y - cy) / box[3]) ** 2 < 0.25


def compressed(mask):
    return {"size": list(mask.shape), "counts": rle.to_string(rle.encode(mask))}


def random_results(seed=0, count=24, most=20):
    """Objects of all areas and detections that are near them or not, some of a wrong class, some of equal scores."""
    random = np.random.default_rng(seed)
    images = []
    for position in range(count):
        size = tuple(int(side) for side in random.integers(170, 240, 2))
        n = 0 if position % 6 == 5 else int(random.integers(1, most))
        sides = np.exp(random.uniform(np.log(6), np.log(160), (n, 2)))
        boxes = np.concatenate([random.random((n, 2)) * (np.array(size[::-1]) - sides).clip(0), sides], 1)
        classes = random.integers(0, CLASSES - 1, n)  # the last class has no object, but detections
        masks = [blob(random, size, box) for box in boxes]
        near = [i for i in range(n) for _ in range(int(random.integers(0, 4)))]
        found = boxes[near] + random.normal(0, 0.06, (len(near), 4)) * np.tile(boxes[near][:, 2:], (1, 2))
        found[:, 2:] = found[:, 2:].clip(2)
        labels = np.where(
            random.random(len(near)) < 0.85, classes[near], random.integers(0, CLASSES, len(near))
        )
        scores = random.random(len(near)).round(2)  # ties
        order = np.argsort(-scores, kind="stable")
        truth = Instances(
            boxes, classes, np.array([float(mask.sum()) for mask in masks]), random.random(n) < 0.1,
            tuple(map(compressed, masks)), size,
        )  # fmt: skip
        images.append(
            ImageResult(
                position, 1000 + 3 * position, f"{position}", size, found[order], scores[order], labels[order].astype(np.int64),
                tuple(compressed(blob(random, size, found[i]))["counts"] for i in order), truth,
            )
        )  # fmt: skip
    return images


def by_pycocotools(images, kind, detections=(1, 10, 100)):
    """``stats``, and AP by class, of the same images written as COCO's files."""
    annotations = []
    for image in images:
        truth = image.truth
        for i in range(len(truth)):
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": image.image_id, "category_id": int(truth.classes[i]),
                    "bbox": truth.boxes[i].tolist(), "area": float(truth.area[i]), "iscrowd": int(truth.crowd[i]),
                    "segmentation": truth.segmentations[i],
                }
            )  # fmt: skip
    results = [one for image in images for one in image.results(list(range(CLASSES)))]
    for one in results:
        del one["segmentation" if kind == "bbox" else "bbox"]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "info": {}, "annotations": annotations, "categories": [{"id": n} for n in range(CLASSES)],
            "images": [{"id": i.image_id, "height": i.size[0], "width": i.size[1]} for i in images],
        }  # fmt: skip
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.params.maxDets = list(detections)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][..., 0, -1]
    ap = np.array(
        [precision[:, :, k].mean() if (precision[:, :, k] > -1).any() else np.nan for k in range(CLASSES)]
    )
    return np.array(evaluation.stats), ap


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_numbers_are_pycocotools(kind):
    images = random_results()
    stats, ap = by_pycocotools(images, kind)
    found = coco_numbers.numbers(images, CLASSES, kind)
    assert tuple(found.summary) == NAMES
    assert np.abs(np.array(list(found.summary.values())) - stats).max() < 1e-9
    assert len({round(value, 3) for value in stats}) > 8 and 0.2 < stats[0] < 0.9, (
        "a set that tells them apart"
    )
    assert found.ap == pytest.approx(ap, abs=1e-9, nan_ok=True) and np.isnan(found.ap[-1])
    assert np.nanmean(found.ap) == pytest.approx(found.summary["ap"], abs=1e-9)
    assert np.nanmean(found.ap50) == pytest.approx(found.summary["ap50"], abs=1e-9)
    assert np.nanmean(found.ar) == pytest.approx(found.summary["ar100"], abs=1e-9)


def test_more_detections_than_coco_has_change_all_but_ar100():
    one = random_results(1, count=2, most=4)[0]
    box, few = one.truth.boxes[:1], 140
    crowded = ImageResult(
        0, 1, "x", one.size, np.repeat(box, few, 0) + np.linspace(60, 0, few)[:, None] * [[1, 1, 0, 0]],
        np.linspace(0.9, 0.1, few), np.full(few, one.truth.classes[0]), ("",) * few, one.truth,
    )  # fmt: skip
    at_100 = coco_numbers.numbers([crowded], CLASSES, "bbox").summary
    at_300 = coco_numbers.numbers([crowded], CLASSES, "bbox", 300).summary
    assert at_300["ap"] > at_100["ap"] == 0.0 and at_300["ar100"] == at_100["ar100"] == 0.0
    assert coco_numbers.numbers([crowded], CLASSES, "bbox", 5).summary == pytest.approx(at_100, nan_ok=True)


def test_what_no_object_could_be_of_is_nan():
    (image,) = random_results(2, count=1)
    truth = Instances(
        np.array([[5.0, 5, 20, 20]]), np.array([1]), np.array([400.0]), np.array([False]), (None,), image.size
    )
    nothing = ImageResult(
        0, 1, "x", image.size, np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64), None, truth
    )
    found = coco_numbers.numbers([nothing], CLASSES, "bbox").summary
    assert found["ap"] == found["ap_small"] == found["ar100"] == 0.0
    assert np.isnan([found["ap_medium"], found["ap_large"], found["ar_large"]]).all()


def test_boundaries_are_harder_than_masks():
    images = random_results()
    masks, outlines = (coco_numbers.numbers(images, CLASSES, kind).summary for kind in ("segm", "boundary"))
    assert 0.0 < outlines["ap"] < masks["ap"]


def test_results_are_in_the_ids_of_the_file():
    image = random_results()[0]
    found = image.results(IDS)
    kept = [number for number in image.classes.tolist() if IDS[number] is not None]
    assert [one["category_id"] for one in found] == [IDS[number] for number in kept] and len(kept) < len(
        image.classes
    )
    assert {one["image_id"] for one in found} == {image.image_id}
    json.dumps(found)
    assert found[0]["segmentation"]["size"] == list(image.size)


def test_any_segmentation_is_compressed_as_coco_does():
    size = (60, 80)
    polygons = [[10.3, 5.2, 40.9, 8.1, 33.3, 50.7], [50.0, 20.0, 70.0, 20.0, 70.0, 50.5, 50.0, 50.5]]
    wanted = coco_mask.merge(coco_mask.frPyObjects(polygons, *size))["counts"].decode()
    assert coco_numbers.compressed(polygons, size) == {"size": [60, 80], "counts": wanted}
    runs = rle.from_string(wanted)
    for form in (wanted, wanted.encode(), runs.tolist()):
        assert coco_numbers.compressed({"size": list(size), "counts": form}, size)["counts"] == wanted


def test_a_missing_package_is_said(monkeypatch):
    coco_numbers.check_installed()
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(UserError, match="pip install faster-coco-eval"):
        coco_numbers.check_installed()
