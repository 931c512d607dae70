"""Evaluation of a detector: divided over ranks as over none, at the images' own size, and what a report gets of it."""

import base64
import io
import json
import logging
from dataclasses import replace

import numpy as np
import objects
import pytest
import torch
import yaml
from PIL import Image

from dattrain.config.load import loads
from dattrain.data.annotations import rle
from dattrain.data.annotations.instances import Instances
from dattrain.data.augment.dense_plan import resized_size
from dattrain.data.detection_batch import DetectionBatch
from dattrain.errors import UserError
from dattrain.tasks import coco_numbers
from dattrain.tasks.coco_ap import CocoAP, names
from dattrain.tasks.coco_numbers import ImageResult
from dattrain.tasks.detected_images import IOU, LONGEST, SHOWN, judge

CONFIG = loads(yaml.safe_dump(objects.RECIPE)).config
CPU = torch.device("cpu")
COUNT = 12


def truth_of(shapes, size, *, masks=True, crowd=False):
    entries = [objects.annotation(shape, 1, 1) for shape in shapes]
    return Instances(
        np.asarray([one["bbox"] for one in entries], dtype=np.float64).reshape(-1, 4),
        np.asarray([shape.number for shape in shapes], dtype=np.int64),
        np.asarray([one["area"] for one in entries], dtype=np.float64),
        np.asarray([crowd and i == 0 for i in range(len(shapes))], dtype=np.bool_),
        tuple(one["segmentation"] if masks else None for one in entries),
        size,
    )


def one(index, *, masks=True, crowd=False, bad=()):
    pixels, shapes = objects.scene(0, index, size=None if index else (400, 700))
    size = pixels.shape[:2]
    return DetectionBatch(
        images=torch.from_numpy(pixels).permute(2, 0, 1)[None],
        sizes=torch.tensor([size]),
        boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64),
        masks=torch.zeros(0, 0, 0, dtype=torch.uint8), counts=(0,), weight=torch.ones(1),
        position=torch.tensor([index]), keys=[f"scene {index}"], bad=bad,
        truth=(truth_of(shapes, size, masks=masks, crowd=crowd),), image_ids=(1000 + index,),
    )  # fmt: skip


EMPTY = DetectionBatch(
    torch.zeros(0, 3, 32, 32, dtype=torch.uint8), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 4),
    torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0, 0, dtype=torch.uint8), (), torch.zeros(0),
    torch.zeros(0, dtype=torch.int64), [],
)  # fmt: skip


class Network:
    """Finds the objects of a batch's truth, off by some pixels, and some that are not there."""

    def __init__(self):
        self.inputs = []

    def of(self, batch, *, off=2.0, masks=True):
        index = int(batch.position[0])
        random = np.random.default_rng(index)
        pixels, shapes = objects.scene(0, index, size=None if index else (400, 700))

        def forward(x, sizes):
            self.inputs.append((tuple(x.shape), sizes))
            (height, width), (own_height, own_width) = sizes[0], pixels.shape[:2]
            scale = np.array([width / own_width, height / own_height] * 2)
            boxes = np.array([one.box for one in shapes], dtype=np.float64).reshape(-1, 4)
            boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
            boxes = np.concatenate([boxes + random.normal(0, off, boxes.shape), [[5.0, 5, 25, 25]]]) * scale
            found = {
                "boxes": torch.tensor(boxes, dtype=torch.float32),
                "scores": torch.tensor([*random.uniform(0.4, 1, len(shapes)), 0.2], dtype=torch.float32),
                "labels": torch.tensor([*(one.number for one in shapes), 1]),
            }
            if masks:
                inner = torch.zeros(28, 28)
                inner[1:-1, 1:-1] = 0.9
                found["masks"] = inner.expand(len(boxes), 28, 28)
            order = found["scores"].argsort(descending=True)
            return [{name: each[order] for name, each in found.items()}]

        return forward


class Ranks:
    """Some evaluators in one process; the one of ``rank`` asks."""

    def __init__(self, evaluators, rank=0, said=None):
        self.evaluators, self.rank, self.said = evaluators, rank, said if said is not None else []
        self.kept = [evaluator._images._kept for evaluator in evaluators]
        self.own = [list(evaluator._own) for evaluator in evaluators]

    def gather(self, value):
        return self.kept

    def gather_to_first(self, value):
        return self.own if self.rank == 0 else None

    def on_first(self, function):
        if self.rank == 0:
            self.said.append(function())
            return self.said[-1]
        return self.said.pop(0)


@pytest.fixture(scope="module")
def evaluated():
    """Evaluators of twelve images: one, and two that have half of them each."""
    network = Network()
    alone, *pair = (CocoAP(CONFIG, CPU, torch.float32) for _ in range(3))
    for index in range(COUNT):
        for evaluator in (alone, pair[index % 2]):
            batch = one(index, crowd=index == 3)
            evaluator.update(network.of(batch), batch, lockstep=False)
    bad = one(COUNT, bad=(("scene", "cut short"),))
    alone.update(network.of(bad), bad, lockstep=False)
    pair[0].update(network.of(one(0)), EMPTY, lockstep=False)
    said = []
    found = []
    for evaluator, ranks in (
        (alone, Ranks([alone])),
        (pair[0], Ranks(pair, 0, said)),
        (pair[1], Ranks(pair, 1, said)),
    ):
        found.append((evaluator.compute(ranks), evaluator.predictions(ranks)))
    return alone, found, network


def test_ranks_change_no_bit(evaluated):
    _, ((alone, shown), *pair), _ = evaluated
    for metrics, predictions in pair:
        assert metrics == alone
        assert json.dumps(predictions) == json.dumps(shown), "the same on every rank"


def test_metrics_are_percent_of_boxes_and_masks(evaluated):
    evaluator, ((metrics, _), *_), _ = evaluated
    assert metrics["images"] == COUNT and set(metrics) <= {*names("mask_rcnn"), "images"}
    assert (
        30 < metrics["ap"] < metrics["ap50"] < 100 and 30 < metrics["mask_ap"] < metrics["mask_ap50"] <= 100
    )
    assert len(evaluator.results) == COUNT
    again = coco_numbers.numbers(evaluator.results, 3, "segm").summary
    assert metrics["mask_ap75"] == 100 * again["ap75"]
    assert names("faster_rcnn") == coco_numbers.NAMES


def test_an_image_is_resized_and_padded_alone(evaluated):
    _, _, network = evaluated
    shape, sizes = network.inputs[0]
    own = resized_size(400, 700, short_side=64, long_side=96)
    assert sizes == [own] and shape == (1, 3, *(-(-side // 32) * 32 for side in own))


def test_boxes_and_masks_are_at_the_size_of_the_stored_image():
    batch = one(0)
    evaluator = CocoAP(CONFIG, CPU, torch.float32)
    height, width = 400, 700

    def forward(x, sizes):
        ((rows, columns),) = sizes
        # The right half of the image, and beyond it by the rounding of the resize.
        box = torch.tensor([[columns / 2, 0.0, columns + 0.4, rows]])
        return [
            {
                "boxes": box,
                "scores": torch.ones(1),
                "labels": torch.ones(1).long(),
                "masks": torch.ones(1, 28, 28),
            }
        ]

    evaluator.update(forward, batch, lockstep=False)
    (result,) = evaluator._own
    assert result.boxes.tolist() == [[350.0, 0.0, 350.0, 400.0]] and result.image_id == 1000
    mask = rle.decode(rle.from_string(result.masks[0]), height, width)
    # But for the corners, where the mask falls off to both sides.
    assert mask[8:-8, 350:].all() and mask[:, 358:-8].all() and not mask[:, :350].any()


def test_an_empty_batch_calls_the_model_as_often_in_lockstep():
    network, evaluator = Network(), CocoAP(CONFIG, CPU, torch.float32)
    for lockstep in (False, True):
        evaluator.update(network.of(one(0)), EMPTY, lockstep=lockstep)
    assert len(network.inputs) == 1


@pytest.mark.parametrize("alone", [True, False])
def test_objects_with_a_box_alone_have_no_numbers_of_masks(alone, caplog):
    evaluator = CocoAP(CONFIG, CPU, torch.float32)
    for index in range(2):
        batch = one(index, masks=not alone and index == 0)
        evaluator.update(Network().of(batch), batch, lockstep=False)
    with caplog.at_level(logging.WARNING):
        metrics = evaluator.compute(Ranks([evaluator]))
    assert "ap" in metrics and "mask_ap" not in metrics
    assert "with a box and no mask, the first in " in caplog.text


def test_a_set_without_objects_is_said():
    evaluator = CocoAP(CONFIG, CPU, torch.float32)
    evaluator.update(Network().of(one(6)), one(6), lockstep=False)
    with pytest.raises(UserError, match="there is no object in its 1 image, so there is no AP"):
        evaluator.compute(Ranks([evaluator]))


def opened(url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def test_the_worst_and_the_best_images_are_shown(evaluated):
    _, ((_, shown), *_), _ = evaluated
    assert shown["kind"] == "detection" and shown["images"] == COUNT
    assert len(shown["worst"]) == len(shown["best"]) == SHOWN
    order = [item["quality"] for item in shown["worst"]]
    assert order == sorted(order) and shown["best"][0]["quality"] > order[0]
    item = next(item for item in shown["best"] if item["position"] and len(item["truth"]) > 1)
    pixels, shapes = objects.scene(0, item["position"])
    assert np.array_equal(opened(item["picture"]), pixels)
    assert [each["box"] for each in item["truth"]] == [shape.box for shape in shapes]
    places = opened(item["truth_masks"])
    for place, shape in enumerate(shapes):
        assert np.array_equal(places == place + 1, shape.mask)
    assert opened(item["found_masks"]).max() == len(item["found"]) == len(shapes)
    large = next(item for kind in ("worst", "best") for item in shown[kind] if item["position"] == 0)
    assert max(opened(large["picture"]).shape) == LONGEST
    assert opened(large["truth_masks"]).shape == opened(large["picture"]).shape[:2]


def test_classes_have_their_own_numbers(evaluated):
    evaluator, ((metrics, shown), *_), _ = evaluated
    rows = shown["classes"]
    assert [row["class"] for row in rows] == [0, 1, 2]
    assert np.mean([row["ap"] for row in rows]) == pytest.approx(metrics["ap"], abs=1e-3)
    assert np.mean([row["mask_ap50"] for row in rows]) == pytest.approx(metrics["mask_ap50"], abs=1e-3)
    assert sum(row["objects"] for row in rows) == sum(int((~r.truth.crowd).sum()) for r in evaluator.results)
    assert sum(row["found"] for row in rows) == sum(len(r.scores) for r in evaluator.results)


def result(found, truth, crowd=()):
    """Boxes and classes, of which the detections have falling scores."""
    boxes = np.array([box for box, _ in truth], dtype=np.float64).reshape(-1, 4)
    own = Instances(
        boxes, np.array([number for _, number in truth], dtype=np.int64), boxes[:, 2:].prod(1),
        np.array([i in crowd for i in range(len(truth))], dtype=np.bool_), (None,) * len(truth), (100, 100),
    )  # fmt: skip
    return ImageResult(
        0, 0, "x", (100, 100), np.array([box for box, _ in found], dtype=np.float64).reshape(-1, 4),
        np.linspace(0.9, 0.5, len(found)), np.array([number for _, number in found], dtype=np.int64), None, own,
    )  # fmt: skip


def test_quality_is_panoptic_quality_of_boxes():
    box, near, far = [10, 10, 20, 20], [10, 10, 20, 16], [60, 60, 20, 20]
    assert judge(result([(box, 1)], [(box, 1)])).quality == 1.0
    assert judge(result([(near, 1)], [(box, 1)])).quality == pytest.approx(0.8)
    # One match of IoU .8, one object and two detections without one.
    judged = judge(result([(near, 1), (box, 2), (near, 1)], [(box, 1), (far, 1)]))
    assert judged.quality == pytest.approx(0.8 / 2.5) and judged.right.tolist() == [True, False, False]
    # A crowd takes what lies in it, and is no object.
    assert judge(result([([12, 12, 5, 5], 1)], [(box, 1)], crowd=(0,))) is None
    assert judge(result([([12, 12, 5, 5], 2)], [(box, 1)], crowd=(0,))).quality == 0.0
    assert judge(result([], [])) is None and judge(result([], [(box, 0)])).quality == 0.0
    unsure = replace(result([(box, 1)], [(box, 1)]), scores=np.array([0.1]))
    assert judge(unsure).quality == 0.0
    assert IOU == 0.5 and judge(result([([10, 10, 20, 9], 1)], [(box, 1)])).quality == 0.0
