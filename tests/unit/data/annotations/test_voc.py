"""PASCAL VOC as it is given out."""

from __future__ import annotations

import numpy as np
import pytest
from given import voc

from dattrain.data.annotations.semantic import VOID, semantic_map
from dattrain.data.annotations.voc import VOC
from dattrain.data.source.dataset import open_dataset
from dattrain.data.source.sample import BadSample
from dattrain.errors import UserError

NUMBERS = np.array([[0, 20, 255], [15, 0, 1]], np.uint8)


def test_a_list_is_opened_as_it_is(tmp_path):
    path = voc(tmp_path, {"2007_1": NUMBERS, "2007_2": NUMBERS})
    path.write_text("2007_2\n")
    dataset = open_dataset(str(path))
    assert (dataset.annotations, dataset.classes, int(dataset.counts.sum())) == ("maps", list(VOC), 1)
    assert len(VOC) == 21 and VOC[15] == "person"
    sample = dataset.read(0, 0)
    assert sample.key == "train.txt:2007_2.jpg"
    assert semantic_map(sample.annotation, (2, 3), np.arange(21), "").tolist() == NUMBERS.tolist()
    assert NUMBERS.max() == VOID
    (tmp_path / "class_names.txt").write_text("_background_\ncat\n")
    assert open_dataset(str(path)).classes == ["_background_", "cat"]


def test_what_is_not_there_is_named(tmp_path):
    path = voc(tmp_path, {"a": NUMBERS, "b": NUMBERS})
    with pytest.raises(
        UserError,
        match=r"is a VOC folder; name the list of one split, as .*/train.txt \(it has ImageSets/Segmentation: train.txt\)",
    ):
        open_dataset(str(tmp_path))
    (tmp_path / "SegmentationClass/a.png").unlink()
    dataset = open_dataset(str(path))
    assert dataset.flaws == (f"{path}: 1 of its 2 images have no map in {tmp_path}/SegmentationClass: a.png",)
    with pytest.raises(
        BadSample, match=r"JPEGImages/a.jpg: its map cannot be read: .*SegmentationClass/a.png"
    ):
        [dataset.read(0, i) for i in range(2)]
    (tmp_path / "JPEGImages/b.jpg").unlink()
    assert f"1 of its 2 images are not in {tmp_path}/JPEGImages: b.jpg" in open_dataset(str(path)).flaws[0]
    path.write_text("a\na\n")
    with pytest.raises(UserError, match="names 'a' twice"):
        open_dataset(str(path))
