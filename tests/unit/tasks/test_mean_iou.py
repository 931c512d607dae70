"""Evaluation of segmentation: divided over ranks as over none, and what a report gets of it."""

import base64
import io
import json

import numpy as np
import pytest
import scenes
import torch
import yaml
from PIL import Image

from dattrain.config.load import loads
from dattrain.data.dense_batch import SegmentationBatch
from dattrain.errors import UserError
from dattrain.observe.sheet import sheet
from dattrain.tasks.confusion import confusion, scores
from dattrain.tasks.dense_inference import Inference, decide
from dattrain.tasks.mean_iou import MeanIoU
from dattrain.tasks.segmented_images import LONGEST, SHOWN

CONFIG = loads(yaml.safe_dump(scenes.RECIPE)).config
CPU = torch.device("cpu")


def nearest_colour(x):
    """The class of the nearest colour: logits that are right but for the noise, at a quarter of the size."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CONFIG.augment.mean, CONFIG.augment.std))
    pixels = torch.nn.functional.avg_pool2d((x * std + mean) * 255, 4, ceil_mode=True)
    colours = torch.from_numpy(scenes.COLOURS).float().view(4, 3, 1, 1)
    return -((pixels - colours[:, :, 0, 0].view(1, 4, 3, 1, 1)) ** 2).mean(2) / 400


def one(index, *, void=False, weight=1.0):
    pixels, classes = scenes.scene(0, index, void=void)
    return SegmentationBatch(
        images=torch.from_numpy(pixels).permute(2, 0, 1)[None],
        maps=torch.from_numpy(classes)[None],
        sizes=torch.tensor([classes.shape]),
        weight=torch.tensor([weight]),
        position=torch.tensor([index]),
        keys=[f"scene {index}"],
    )


EMPTY = SegmentationBatch(
    torch.zeros(0, 3, 32, 32, dtype=torch.uint8), torch.zeros(0, 32, 32, dtype=torch.uint8),
    torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0), torch.zeros(0, dtype=torch.int64), [],
)  # fmt: skip


class Ranks:
    """Two evaluators in one process, which exchange at the end."""

    def __init__(self, evaluators):
        self.sums = [
            [e._matrix.clone() for e in evaluators],
            [e._sums.clone() for e in evaluators],
        ]
        self.images = [e._images._kept for e in evaluators]

    def sum(self, values):
        values.copy_(sum(self.sums[values.dtype == torch.float64]))

    def gather(self, value):
        return self.images


@pytest.fixture(scope="module")
def evaluated():
    """Evaluators of twelve images: one, and two that have half of them each."""
    alone, *pair = (MeanIoU(CONFIG, CPU, torch.float32) for _ in range(3))
    for index in range(11):
        for evaluator in (alone, pair[index % 2]):
            evaluator.update(nearest_colour, one(index), lockstep=False)
    for evaluator in (alone, pair[1]):
        evaluator.update(nearest_colour, one(11, void=True), lockstep=False)
        # A bad sample is nothing but void, and does not count as an image.
        evaluator.update(nearest_colour, one(12, void=True, weight=0.0), lockstep=False)
    for evaluator in pair:
        evaluator.update(nearest_colour, EMPTY, lockstep=False)
    ranks = Ranks([alone]), Ranks(pair)
    return [
        (e.compute(r), e.predictions(r))
        for e, r in ((alone, ranks[0]), (pair[0], ranks[1]), (pair[1], ranks[1]))
    ]


def test_ranks_change_no_bit_of_the_counts(evaluated):
    (alone, shown), *pair = evaluated
    for metrics, predictions in pair:
        assert metrics == {**alone, "loss": pytest.approx(alone["loss"], rel=1e-12)}
        assert json.dumps(predictions) == json.dumps(shown), "the same on every rank"


def test_metrics_are_those_of_all_pixels_together(evaluated):
    metrics, shown = evaluated[0]
    total = torch.zeros(4, 4, dtype=torch.int64)
    for index in range(11):
        (image,), (truth,) = one(index).images, one(index).maps
        views = Inference(CONFIG, torch.float32).views(nearest_colour, image)
        total += confusion(truth, decide(views, truth.shape).classes, 4)
    found = scores(total)
    assert (metrics["miou"], metrics["macc"], metrics["aacc"]) == (found.miou, found.macc, found.aacc)
    assert metrics["images"] == 12 and 60 < metrics["miou"] < 100 and 0 < metrics["loss"] < 1
    assert [each["class"] for each in shown["classes"]] == [0, 1, 2, 3]
    assert [each["iou"] for each in shown["classes"]] == pytest.approx(found.iou.tolist(), abs=1e-4)
    assert sum(each["pixels"] for each in shown["classes"]) == int(total.sum())
    assert shown["pairs"] == sorted(shown["pairs"], key=lambda pair: -pair[2])
    assert sum(n for *_, n in shown["pairs"]) == int(total.sum() - total.diagonal().sum())


def test_the_worst_and_the_best_images_are_shown(evaluated):
    shown = evaluated[0][1]
    assert len(shown["worst"]) == len(shown["best"]) == SHOWN
    ious = [item["iou"] for item in shown["worst"]]
    assert ious == sorted(ious) and shown["best"][0]["iou"] >= shown["best"][-1]["iou"] > ious[0]
    item = shown["best"][0]
    pixels, classes = scenes.scene(0, item["position"])
    opened = {
        kind: Image.open(io.BytesIO(base64.b64decode(item[kind].partition(",")[2])))
        for kind in ("picture", "truth", "prediction")
    }
    assert np.array_equal(np.asarray(opened["picture"]), pixels) and np.array_equal(
        np.asarray(opened["truth"]), classes
    )
    predicted = np.asarray(opened["prediction"])
    matrix = confusion(torch.from_numpy(classes), torch.from_numpy(predicted.copy()), 4)
    assert 100 * float(matrix.diagonal().sum() / matrix.sum()) == pytest.approx(item["accuracy"], abs=1e-3)
    there = [n for n in range(4) if (classes == n).any()]
    assert float(np.mean(scores(matrix).iou[there])) == pytest.approx(item["iou"], abs=1e-3)
    assert sheet(shown["worst"], scenes.CLASSES).shape[2] == 3


def test_large_images_are_shown_small():
    evaluator = MeanIoU(CONFIG, CPU, torch.float32)
    batch = one(0)
    large = SegmentationBatch(
        batch.images.repeat(1, 1, 5, 9), batch.maps.repeat(1, 5, 9), batch.sizes * torch.tensor([5, 9]),
        batch.weight, batch.position, batch.keys,
    )  # fmt: skip
    evaluator.update(nearest_colour, large, lockstep=False)
    (seen,) = evaluator._images._kept["best"]
    assert max(seen.truth.shape) == LONGEST and seen.picture.shape == (3, *seen.truth.shape)
    assert seen.prediction.shape == seen.truth.shape and set(np.unique(seen.truth)) <= {*range(4), 255}


def test_a_set_without_labels_is_said():
    evaluator = MeanIoU(CONFIG, CPU, torch.float32)
    evaluator.update(nearest_colour, one(0, void=True), lockstep=False)
    with pytest.raises(UserError, match="no pixel of its 1 images has a class"):
        evaluator.compute(Ranks([evaluator]))
