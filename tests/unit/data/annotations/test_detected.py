"""Objects for detection: which class of the network they have, what is refused, and the file's own ids."""

from __future__ import annotations

import json

import numpy as np
import pytest
from given import coco, noise, size_of, turned
from pictures import write_tar

from dattrain.cli.main import main
from dattrain.config.schema import Config
from dattrain.data.annotations.detection import category_ids, detected
from dattrain.data.annotations.kinds import KINDS, check_kind, flaws, needs_masks
from dattrain.data.classes import Classes
from dattrain.data.factory import assign_class_numbers
from dattrain.data.source.dataset import open_dataset
from dattrain.data.source.sample import BadSample, Dataset
from dattrain.errors import ConfigError, UserError

SQUARE = [[0, 0, 2, 0, 2, 2, 0, 2]]
CONTENT = {
    "images": [{"id": 7, "file_name": "a.jpg", "height": 6, "width": 8}, {"id": 8, "file_name": "b.jpg"}],
    "categories": [{"id": 90, "name": "dog"}, {"id": 3, "name": "cat"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 90, "bbox": [0, 0, 2, 2], "area": 4, "segmentation": SQUARE},
        {"id": 2, "image_id": 7, "category_id": 3, "bbox": [7, 4, 1, 2], "area": 2, "iscrowd": 1,
         "segmentation": {"size": [6, 8], "counts": [46, 2]}},
    ],
}  # fmt: skip


def config(num_classes: int, **task: str) -> Config:
    base = {
        "task": {"kind": "detection", "head": "mask_rcnn", **task},
        "model": {"num_classes": num_classes},
        "augment": {"randaugment": None, "color_jitter": 0.0, "mixup": 0.0, "cutmix": 0.0, "erase_prob": 0.0, "label_smoothing": 0.0},
        "geometry": {"crop": None, "distortion": False},
        "eval": {"batch": 1},
    }  # fmt: skip
    return Config.model_validate(base)


def sample_of(dataset: Dataset, key: str = "a"):
    samples = (dataset.read(0, i) for i in range(int(dataset.counts[0])))
    return next(s for s in samples if key in s.key.rpartition(":")[2])


def test_the_background_is_no_class_of_the_network(tmp_path):
    path = coco(tmp_path, CONTENT)
    out = str(tmp_path / "out")
    assert main(["data", "pack", "--coco", str(path), out, "--jobs", "1"]) == 0
    for spec in (str(path), out):
        dataset = open_dataset(spec)
        assert dataset.category_ids is not None and list(dataset.category_ids) == [None, 3, 90]
        classes, notes = assign_class_numbers(config(2), "train", dataset, None)
        assert (classes.count, classes.names, notes) == (2, ("cat", "dog"), [])
        sample = sample_of(dataset)
        found = detected(sample.annotation, (6, 8), dataset.numbers, sample.where, masks=True)
        assert found.classes.tolist() == [1, 0] and found.crowd.tolist() == [False, True]
        assert category_ids(dataset, 2) == [3, 90]
        own = detected(sample.annotation, (6, 8), None, sample.where, masks=False)
        assert own.classes.tolist() == [2, 1]
        background = sample.annotation.replace(b'"class":2', b'"class":0').replace(
            b'"class": 2', b'"class": 0'
        )
        with pytest.raises(
            BadSample, match="object 0 of its annotation has class 0, which is the background"
        ):
            detected(background, (6, 8), dataset.numbers, sample.where, masks=False)


def test_objects_of_the_background_are_told_when_a_set_is_opened(tmp_path, capsys):
    content = {**CONTENT, "categories": [{"id": 90, "name": "Background"}, CONTENT["categories"][1]]}
    path = str(coco(tmp_path, content))
    dataset = open_dataset(path)
    (told,) = flaws(dataset, "detection", masks=False)
    assert "1 object of the category background (id 90): annotation 1 of image 7; in detection" in told
    assert not flaws(dataset, "segmentation", masks=True)
    assert main(["data", "stats", path, "--jobs", "1"]) == 0
    assert "odd          1 object of the background: bad samples in detection" in capsys.readouterr().out


def test_a_class_without_objects_is_told(tmp_path):
    content = {**CONTENT, "categories": [*CONTENT["categories"], {"id": 5, "name": "cow"}]}
    dataset = open_dataset(str(coco(tmp_path, content)))
    (note,) = assign_class_numbers(config(3), "train", dataset, None)[1]
    assert note.endswith("has images of 2 of 3 classes; none of cow")
    assert category_ids(dataset, 3) == [3, 5, 90], "results are in the file's own ids all the same"


def test_validation_is_asked_by_name(tmp_path):
    network = Classes(3, ("bird", "dog", "cat"), "a run")
    dataset = open_dataset(str(coco(tmp_path, CONTENT)))
    assign_class_numbers(config(3), "val", dataset, network)
    sample = sample_of(dataset)
    assert detected(sample.annotation, (6, 8), dataset.numbers, "", masks=True).classes.tolist() == [1, 2]
    assert category_ids(dataset, 3) == [None, 90, 3], "the file has no bird"
    with pytest.raises(UserError, match="'dog' is no class of a run"):
        assign_class_numbers(config(2), "val", dataset, Classes(2, ("bird", "cat"), "a run"))


def test_counts_that_are_off_by_the_background_say_so(tmp_path):
    dataset = open_dataset(str(coco(tmp_path, CONTENT)))
    with pytest.raises(
        ConfigError,
        match=r"has 2 classes \(cat, dog\), .*set model.num_classes=2: detection has no class for",
    ):
        assign_class_numbers(config(3), "train", dataset, None)
    with pytest.raises(ConfigError, match=r"set model.num_classes=2$"):
        assign_class_numbers(config(4), "train", dataset, None)
    segmentation = config(2, kind="segmentation", head="upernet")
    with pytest.raises(ConfigError, match=r"set model.num_classes=3: of segmentation, background is a class"):
        assign_class_numbers(segmentation, "train", dataset, None)


def test_masks_are_asked_for_by_the_head(tmp_path):
    content = {
        **CONTENT,
        "annotations": [CONTENT["annotations"][0], {**CONTENT["annotations"][1], "segmentation": []}],
    }
    sample = sample_of(open_dataset(str(coco(tmp_path, content))))
    assert len(detected(sample.annotation, (6, 8), None, "x", masks=False)) == 2
    with pytest.raises(BadSample, match="x: object 1 of its annotation has a box and no mask"):
        detected(sample.annotation, (6, 8), None, "x", masks=True)
    with pytest.raises(BadSample, match="8 x 6 pixels, its image 9 x 6"):
        detected(sample.annotation, (6, 9), None, "x", masks=False)
    heads = [
        head
        for head in ("retinanet", "faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn")
        if needs_masks("detection", head)
    ]
    assert heads == ["mask_rcnn", "cascade_mask_rcnn"] and needs_masks("segmentation", "upernet")


def test_what_is_learned_from_and_what_is_measured(tmp_path):
    objects = [
        {"class": 1, "bbox": [1, 1, 3, 2], "segmentation": SQUARE, "ignore": 1},
        {"class": 1, "bbox": [0, 0, 4, 4], "iscrowd": 1},
        {"class": 1, "bbox": [0, 0, 4, 0.5]},
        {"class": 1, "bbox": [8, 0, 4, 4]},
        {"class": 1, "bbox": [0, 0, 4, 4], "area": 0},
        {"class": 1, "bbox": [-1, 4, 4, 4]},
        {"class": 1, "segmentation": [[1, 1, 4, 1, 4, 3]]},
        {"class": 1, "segmentation": {"size": [6, 8], "counts": [6, 2, 40]}},
    ]
    annotation = json.dumps({"annotations": objects}).encode()
    learned = detected(annotation, (6, 8), None, "", masks=False, training=True)
    assert learned.boxes.tolist() == [[0, 0, 4, 4], [-1, 4, 4, 4], [1, 1, 3, 2], [1, 0, 1, 2]]
    assert learned.area.tolist() == [0, 16, 3, 2], "of the mask where nothing is said"
    assert learned.segmentations[1] is None and learned.segmentations[2] == [[1, 1, 4, 1, 4, 3]]
    measured = detected(annotation, (6, 8), None, "", masks=False)
    assert measured.boxes[:2].tolist() == [[1, 1, 3, 2], [0, 0, 4, 4]] and len(measured) == 8
    assert np.flatnonzero(measured.crowd).tolist() == [1] and measured.ignored == {0}
    content = {**CONTENT, "annotations": [{**CONTENT["annotations"][0], "ignore": 1}]}
    content["annotations"][0].pop("area")
    path = coco(tmp_path, content)
    assert main(["data", "pack", "--coco", str(path), str(tmp_path / "out"), "--jobs", "1"]) == 0
    for spec in (str(path), str(tmp_path / "out")):
        sample = sample_of(open_dataset(spec))
        assert detected(sample.annotation, (6, 8), None, "", masks=True).area.tolist() == [4]
        assert len(detected(sample.annotation, (6, 8), None, "", masks=True, training=True)) == 0


def test_other_sets_are_refused():
    with pytest.raises(UserError, match=r"a map of .* needs objects: .*this set, task.kind=segmentation$"):
        check_kind("maps", KINDS["detection"], "data.train=x", "detection")
    with pytest.raises(UserError, match=r"for this set, task.kind=detection or segmentation$"):
        check_kind("instances", KINDS["classification"], "data.train=x", "classification")
    check_kind("instances", KINDS["detection"], "data.train=x", "detection")


def test_numbers_without_names_are_the_networks_own(tmp_path):
    objects = {"annotations": [{"category_id": i, "bbox": [0, 0, 1, 2]} for i in (0, 2)]}
    shard = write_tar(
        tmp_path / "t-0.tar", [("a.jpg", noise(2, 2)), ("a.json", json.dumps(objects).encode())]
    )
    assert main(["data", "index", str(shard), "--jobs", "1"]) == 0
    dataset = open_dataset(str(shard))
    classes, _ = assign_class_numbers(config(3), "train", dataset, None)
    assert (classes.names, dataset.category_ids, category_ids(dataset, 3)) == ((), None, [0, 1, 2])
    annotation = dataset.read(0, 0).annotation
    assert detected(annotation, (2, 2), dataset.numbers, "x", masks=False).classes.tolist() == [0, 2]
    assign_class_numbers(config(2), "train", dataset, None)
    with pytest.raises(BadSample, match="object 1 of its annotation has class 2, but there are 2 classes"):
        detected(annotation, (2, 2), dataset.numbers, "x", masks=False)


def test_ids_of_categories_survive_packing_into_numbers_of_another_split(tmp_path):
    train = {**CONTENT, "categories": [*CONTENT["categories"], {"id": 1, "name": "bird"}]}
    val = {**CONTENT, "categories": [{"id": 5, "name": "cat"}, {"id": 2, "name": "dog"}]}
    val["annotations"] = [{**CONTENT["annotations"][0], "category_id": 2}]
    out = tmp_path / "out"
    for split, content in (("train", train), ("val", val)):
        path = coco(tmp_path / split, content, f"{split}2017", f"instances_{split}2017.json")
        assert main(["data", "pack", "--coco", str(path), str(out), "--jobs", "1"]) == 0
    shards = {split: open_dataset(f"{out}/{split}-*.tar") for split in ("train", "val")}
    assert shards["train"].classes == shards["val"].classes == ["background", "bird", "cat", "dog"]
    assert shards["train"].category_ids == (None, 1, 3, 90) and shards["val"].category_ids == (
        None,
        None,
        5,
        2,
    )
    assert open_dataset(f"{out}/train-*.tar::{out}/val-*.tar").category_ids is None, "two numberings"
    links = ["--out", str(tmp_path / "links"), "--jobs", "1"]
    assert main(["data", "index", f"{out}/val-*.tar", *links]) == 0
    assert open_dataset(str(tmp_path / "links")).category_ids == (None, None, 5, 2)
    assert main(["data", "pack", f"{out}/val-*.tar", str(tmp_path / "again"), "--jobs", "1"]) == 0
    assert open_dataset(str(tmp_path / "again")).category_ids == (None, None, 5, 2)
    # Manifests of before there were ids.
    path = out / "_val.manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["category_ids"]
    path.write_text(json.dumps(manifest))
    old = open_dataset(f"{out}/val-*.tar")
    assert old.category_ids is None
    assign_class_numbers(config(3), "val", old, Classes(3, ("bird", "cat", "dog"), "a run"))
    assert category_ids(old, 3) == [1, 2, 3], "its own numbers"
    path.write_text(json.dumps({**manifest, "category_ids": [None, 1.5]}))
    with pytest.raises(UserError, match="category_ids are no list of 4 ids"):
        open_dataset(f"{out}/val-*.tar")


def test_sizes_are_told_without_the_images(tmp_path):
    path = coco(tmp_path, CONTENT)
    dataset = open_dataset(str(path))
    places = {dataset.key(0, i).partition(":")[2]: i for i in range(2)}
    assert dataset.image_size(0, places["a.jpg"]) == (6, 8)
    assert dataset.image_size(0, places["b.jpg"]) == (0, 0), "its JSON does not say"
    assert main(["data", "pack", "--coco", str(path), str(tmp_path / "out"), "--jobs", "1"]) == 0
    shards = open_dataset(str(tmp_path / "out"))
    sizes = {shards.key(0, i).rpartition("-")[2]: shards.image_size(0, i) for i in range(2)}
    assert sizes == {"a": (6, 8), "b": (8, 8)}
    # An image that its EXIF orientation turns is read, and so indexed, as it was annotated.
    objects = {"height": 24, "width": 16, "annotations": [{"category_id": 0, "bbox": [0, 0, 9, 20]}]}
    members = [("a.jpg", turned((24, 16), 6)), ("a.json", json.dumps(objects).encode())]
    shard = write_tar(tmp_path / "t-0.tar", members)
    assert main(["data", "index", str(shard), "--jobs", "1"]) == 0
    foreign = open_dataset(str(shard))
    assert foreign.image_size(0, 0) == (24, 16) == size_of(foreign.read(0, 0).data)[::-1]
