"""What ``dattrain demo detect`` shows at its end: the trainings' curves, and scenes with their truth and what each finds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dattrain.data.annotations import instances, segmentations
from dattrain.data.source.dataset import Dataset, Sample
from dattrain.demo import sheet
from dattrain.demo.sheet import Pixels
from dattrain.drawing import Shape, colour, draw
from dattrain.pretrained.detect import detect
from dattrain.pretrained.weights import load_model


def picture(file: Path, runs: Mapping[str, Path], val: str) -> None:
    """Loss and AP50 of the runs, by their titles, above scenes of ``val``, their truth, and what each run finds in them."""
    pixels, truth, names = sheet.scenes(val, _truth)
    rows = [pixels, truth]
    for folder in runs.values():
        model, cfg = load_model(folder)
        rows.append([found.overlay(text=False) for found in detect(model, cfg, pixels)])
    # The set's own classes begin with the background, a detector's do not.
    legend = {name: "#" + bytes(colour(number)).hex() for number, name in enumerate(names[1:])}
    metric = "ap50", "AP50 of boxes on scenes of unseen items, %"
    sheet.draw(file, runs, metric, "training loss (each head has its own)", rows, legend)


def _truth(dataset: Dataset, sample: Sample, pixels: Pixels) -> Pixels:
    found = instances.parse(sample.annotation, sample.where)
    size = pixels.shape[:2]
    shapes = [
        Shape(
            (x, y, x + width, y + height),
            number - 1,
            mask=None if segmentation is None else segmentations.mask(segmentation, size, sample.where),
        )
        for (x, y, width, height), number, segmentation in zip(
            found.boxes.tolist(), found.classes.tolist(), found.segmentations
        )
    ]
    return draw(pixels, shapes)
