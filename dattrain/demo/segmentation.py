"""What ``dattrain demo segment`` shows at its end: the two trainings' curves, and scenes with their truth and both predictions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dattrain.data.annotations.semantic import semantic_map
from dattrain.data.source.dataset import Dataset, Sample
from dattrain.demo import sheet
from dattrain.demo.sheet import Pixels
from dattrain.models.dense.segmenter import Segmenter
from dattrain.palette import is_background, overlay, palette
from dattrain.pretrained.segment import segment
from dattrain.pretrained.weights import load_model


def picture(file: Path, runs: Mapping[str, Path], val: str) -> None:
    """Loss and mIoU of the runs, by their titles, above scenes of ``val``, their truth, and what each network makes of them."""
    pixels, truth, names = sheet.scenes(val, _truth)
    rows = [pixels, truth]
    for folder in runs.values():
        model, cfg = load_model(folder)
        assert isinstance(model, Segmenter)
        rows.append([found.overlay() for found in segment(model, cfg, pixels)])
    colours = dict(zip(names, palette(len(names)) / 255))
    legend = {name: "none" if is_background(name) else colour for name, colour in colours.items()}
    metric = "miou", "mIoU on scenes of unseen items, %"
    sheet.draw(file, runs, metric, "training loss", rows, legend)


def _truth(dataset: Dataset, sample: Sample, pixels: Pixels) -> Pixels:
    numbers = semantic_map(sample.annotation, pixels.shape[:2], dataset.numbers, sample.where)
    return overlay(pixels, numbers, dataset.classes or ())
