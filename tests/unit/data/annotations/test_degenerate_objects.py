"""Degenerate objects of a COCO JSON: an evaluation counts them as pycocotools does, training and maps do without them."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace

import numpy as np
from given import coco, size_of
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dattrain.data.annotations import rle
from dattrain.data.annotations.detection import detected
from dattrain.data.annotations.semantic import semantic_map
from dattrain.data.prepare.pack import pack
from dattrain.data.prepare.write_shard import PackOptions
from dattrain.data.source.dataset import open_dataset
from dattrain.tasks import coco_numbers

SIZE = (120, 150)
GOOD = [[5, 5, 40, 50], [60, 10, 20, 20], [70, 70, 60, 40]]
ODD = [([30, 8, 0.4, 60], 24), ([500, 500, 10, 10], 100), ([-30, 10, 20, 20], 400), ([90, 40, -9, -9], 81)]
"""Boxes and areas."""
NO_AREA = [([100, 5, 40, 40], 0), ([5, 80, 20, 30], -1)]
"""Whose area is no number of pixels: they are learned from, and pycocotools goes by what is said."""


def row(i, box, area):
    x, y, width, height = box
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    return {"id": i + 1, "image_id": 7, "category_id": 3, "bbox": box, "area": area, "iscrowd": 0, "segmentation": [corners]}  # fmt: skip


def content(*boxes):
    return {
        "images": [{"id": 7, "file_name": "a.jpg", "height": SIZE[0], "width": SIZE[1]}],
        "categories": [{"id": 3, "name": "cat"}],
        "annotations": [row(i, *one) for i, one in enumerate(boxes)],
    }


def by_pycocotools(path, results, kind):
    rows = [{k: v for k, v in one.items() if kind == "bbox" or k != "bbox"} for one in results]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(rows), kind)
        for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
            step()
    return np.where(evaluation.stats > -1, evaluation.stats, np.nan)


def result_of(truth):
    """Detections near the objects that lie in the image, some of them of none."""
    random = np.random.default_rng(1)
    boxes = np.array([[*GOOD[0]], [62, 10, 20, 22], [30, 8, 1, 60], [100, 6, 40, 40], [4, 82, 20, 30], [0, 0, 9, 9]], float)  # fmt: skip
    masks = []
    for x, y, width, height in boxes.astype(int):
        mask = np.zeros(SIZE, bool)
        mask[y : y + height, x : x + width] = True
        masks.append(rle.to_string(rle.encode(mask)))
    runs = tuple(coco_numbers.compressed(one, SIZE) for one in truth.segmentations)
    scores = np.sort(random.random(len(boxes)))[::-1]
    truth = replace(truth, segmentations=runs)
    return coco_numbers.ImageResult(
        0, 7, "a", SIZE, boxes, scores, np.zeros(len(boxes), np.int64), tuple(masks), truth
    )


def test_an_evaluation_counts_what_training_leaves_out(tmp_path):
    good = [(box, box[2] * box[3]) for box in GOOD]
    path = coco(tmp_path / "coco", content(*good, *NO_AREA, *ODD))
    pack(open_dataset(str(path)), tmp_path / "out", PackOptions())
    clean = open_dataset(str(coco(tmp_path / "clean", content(*good, *NO_AREA)))).read(0, 0)
    for spec in (str(path), str(tmp_path / "out")):
        dataset = open_dataset(spec)
        dataset.renumber(np.array([-1, 0]))
        sample = dataset.read(0, 0)
        assert size_of(sample.data) == SIZE[::-1]
        learned = detected(sample.annotation, SIZE, dataset.numbers, spec, masks=True, training=True)
        assert learned.boxes.tolist() == [*GOOD, *(box for box, _ in NO_AREA)]
        result = result_of(detected(sample.annotation, SIZE, dataset.numbers, spec, masks=True))
        for kind in ("bbox", "segm"):
            found = coco_numbers.numbers([result], 1, kind).summary
            theirs = by_pycocotools(path, result.results([3]), kind)
            assert np.allclose(list(found.values()), theirs, rtol=0, atol=1e-9, equal_nan=True)
            assert found["ap"] < 0.7, "what nobody could find counts"
        own = semantic_map(sample.annotation, SIZE, None, spec)
        assert (own == semantic_map(clean.annotation, SIZE, None, "")).all()


def test_a_degenerate_object_needs_no_mask():
    objects = [{"class": 1, "bbox": [0, 0, 0, 2], "segmentation": []}]
    annotation = json.dumps({"annotations": objects}).encode()
    assert not len(detected(annotation, (6, 8), None, "", masks=True, training=True))
    (mask,) = detected(annotation, (6, 8), None, "", masks=True).segmentations
    assert mask == {"size": [6, 8], "counts": rle.to_string([48])}
    assert not semantic_map(annotation, (6, 8), None, "").any()
