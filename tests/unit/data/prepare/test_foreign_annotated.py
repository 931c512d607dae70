"""Shards of images with annotations that others wrote: what is a map, what are objects, and what has a label."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from given import noise
from pictures import encode, write_tar
from PIL import Image

from dattrain.cli.main import main
from dattrain.config.schema import Config
from dattrain.data.annotations import maps
from dattrain.data.annotations.semantic import semantic_map
from dattrain.data.factory import assign_class_numbers
from dattrain.data.source.build_index import build
from dattrain.data.source.dataset import open_dataset
from dattrain.data.source.index import NO_LABEL, ShardIndex
from dattrain.data.source.sample import BadSample
from dattrain.errors import UserError

NUMBERS = np.array([[0, 1], [2, 255]], np.uint8)
MAP = maps.write(NUMBERS)


@pytest.mark.parametrize(
    "members",
    [
        [("a.jpg", noise(2, 2)), ("a.png", MAP)],
        [("a.png", MAP), ("a.jpg", noise(2, 2))],
        [("a.png", noise(2, 2, kind="PNG")), ("a.seg.png", MAP)],
        [("a.jpg", noise(2, 2)), ("a.txt", b"x" * 99_000), ("a.png", MAP), ("a.json", b'{"scene": "room"}')],
    ],
    ids=["map", "first", "seg", "apart"],
)
def test_foreign_shards_of_maps_are_indexed(tmp_path, members):
    shard = write_tar(tmp_path / "t-0.tar", members)
    assert main(["data", "index", str(shard), "--jobs", "1"]) == 0
    dataset = open_dataset(str(shard))
    sample = dataset.read(0, 0)
    assert (dataset.annotations, dataset.classes, sample.label) == ("maps", None, NO_LABEL)
    assert sample.data == next(data for name, data in members if name.endswith("jpg") or data != MAP)
    assert semantic_map(sample.annotation, (2, 2), None, "").tolist() == NUMBERS.tolist()
    assert dataset.index(0).annotated.heights.tolist() == [2]
    # Nothing names its classes, so they are the network's own numbers, of which 2 has none here.
    config = Config.model_validate({"model": {"num_classes": 2}})
    assign_class_numbers(config, "train", dataset, None)
    with pytest.raises(BadSample, match="has class 2 at x=0, y=1"):
        semantic_map(sample.annotation, (2, 2), dataset.numbers, "")


def test_foreign_shards_without_names_of_classes_are_packed(tmp_path, capsys):
    shard = write_tar(tmp_path / "t-0.tar", [("a.jpg", noise(2, 2)), ("a.png", MAP)])
    assert main(["data", "index", str(shard), "--jobs", "1"]) == 0
    assert main(["data", "pack", str(shard), str(tmp_path / "out"), "--jobs", "1"]) == 0
    assert "1 sample in 1 shard, " in (said := capsys.readouterr().out) and "3 classes without names" in said
    sample = open_dataset(str(tmp_path / "out")).read(0, 0)
    assert semantic_map(sample.annotation, (2, 2), None, "").tolist() == NUMBERS.tolist()
    empty = write_tar(tmp_path / "u-0.tar", [("a.jpg", noise(2, 2)), ("a.json", b'{"annotations": []}')])
    assert main(["data", "index", str(empty), "--jobs", "1"]) == 0
    assert main(["data", "stats", str(empty), "--jobs", "1"]) == 0
    assert "classes      0 of 0 present, in instances" in capsys.readouterr().out


def test_figures_of_objects(tmp_path, capsys):
    objects = [
        {"category_id": 0, "bbox": [0, 0, 32, 31.9]},
        {"category_id": 0, "bbox": [-1, 0, 32, 32], "ignore": 1},
        {"category_id": 2, "bbox": [0, 0, 96, 96]},
        {"category_id": 2, "bbox": [0, 0, 98, 101.5], "iscrowd": 1},
        {"category_id": 2, "bbox": [0, 0, 9, 9], "area": -1},
        {"category_id": 2, "bbox": [0, 0, 9, 0.5]},
        {"category_id": 2, "bbox": [100, 0, 9, 9]},
    ]
    rows = [json.dumps({"annotations": found}).encode() for found in (objects, [])]
    members = [(f"{key}.{end}", data) for key, row in zip("ab", rows) for end, data in (("jpg", noise(100, 98)), ("json", row))]  # fmt: skip
    shard = str(write_tar(tmp_path / "t-0.tar", members))
    assert main(["data", "index", shard, "--jobs", "1"]) == 0
    assert main(["data", "stats", shard, "--jobs", "1"]) == 0
    said = capsys.readouterr().out
    assert "classes      2 of 3 present" in said, "0 is a class like the others where nothing names them"
    assert (
        "5 in 2 images, 1 crowds" in said
        and "0                                 2  40.00%         1 images" in said
    )
    assert "per image    2.5 objects in the mean, 5 at most; 1 image without any" in said
    assert "50.0% small (below 32 x 32), 25.0% medium, 25.0% large" in said
    assert main(["data", "verify", shard, "--jobs", "1"]) == 0
    expected = [
        "1 object with a box beyond their image (in t-0.tar:a): training leaves them out, an evaluation of detection counts them",
        "1 object with a side below one pixel (in t-0.tar:a): training leaves them out, an evaluation of detection counts them",
        "1 object marked `ignore`: detection does not learn from them",
        "1 object with a box that ends more than a pixel beyond the image's border (in t-0.tar:a): cut there in training",
    ]
    assert [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()[-5:]] == expected
    assert [line[13:] for line in said.splitlines() if line.startswith("odd ")] == expected


def test_foreign_shards_of_objects_are_indexed(tmp_path):
    objects = {
        "annotations": [{"category_id": 1, "bbox": [0, 0, 1, 2], "segmentation": [[0, 0, 1, 0, 1, 2, 0, 2]]}]
    }
    shard = write_tar(
        tmp_path / "t-0.tar", [("a.jpg", noise(2, 2)), ("a.json", json.dumps(objects).encode())]
    )
    assert main(["data", "index", str(shard), "--jobs", "1"]) == 0
    dataset = open_dataset(str(shard))
    assert dataset.annotations == "instances"
    assert semantic_map(dataset.read(0, 0).annotation, (2, 2), None, "").tolist() == [[1, 0], [1, 0]]
    # A label makes it a set of classes, whatever else stands there.
    labelled = json.dumps({**objects, "label": 3}).encode()
    shard = write_tar(tmp_path / "u-0.tar", [("a.jpg", noise(2, 2)), ("a.json", labelled)])
    index = build(str(shard))
    assert index.annotated is None and index.labels.tolist() == [3]


def test_foreign_shards_that_are_of_two_kinds(tmp_path, capsys):
    mixed = [("a.jpg", noise(2, 2)), ("a.png", MAP), ("b.jpg", noise(2, 2)), ("b.cls", b"3")]
    with pytest.raises(
        UserError, match=r"sample 'a' has maps, and sample 'b' has a label; the samples of a set"
    ):
        build(str(write_tar(tmp_path / "t-0.tar", mixed)))
    colours = encode(Image.new("RGB", (2, 2)), "PNG")
    with pytest.raises(
        UserError, match=r"has 2 images .*where it has no label at most a map of class numbers"
    ):
        build(str(write_tar(tmp_path / "t-0.tar", [("a.jpg", noise(2, 2)), ("a.png", colours)])))
    # What has a label is of classes: a map beside it is not taken in its place.
    for extension, label, field in (
        ("cls", b"3", None),
        ("json", b'{"label": 3}', None),
        ("json", b'{"x": 3}', "x"),
    ):
        labelled = write_tar(
            tmp_path / "t-0.tar", [("a.jpg", noise(2, 2)), ("a.png", MAP), (f"a.{extension}", label)]
        )
        with pytest.raises(UserError, match=r"has 2 images \(a.jpg, a.png\).*`--image EXT"):
            build(str(labelled), label=field)
        index = build(str(labelled), label=field, image="jpg")
        assert index.annotated is None and index.labels.tolist() == [3]
    shard = write_tar(tmp_path / "t-0.tar", [*mixed[:2], ("b.jpg", noise(2, 2))])
    assert main(["data", "index", str(shard), "--jobs", "1"]) == 0
    assert "1 samples have no annotation: " in capsys.readouterr().err
    dataset = open_dataset(str(shard))
    with pytest.raises(BadSample, match=r"sample 'b' at offset .*: has no annotation"):
        dataset.read(0, 1)
    other = write_tar(tmp_path / "t-1.tar", mixed[2:])
    assert main(["data", "index", str(other), "--jobs", "1"]) == 0
    with pytest.raises(UserError, match=r"t-0.tar holds maps beside its images, and .*t-1.tar none"):
        open_dataset(str(tmp_path))


def test_an_annotated_index_survives_its_file_and_a_plain_one_stays_as_it_was(tmp_path):
    shard = write_tar(tmp_path / "t-0.tar", [("a.jpg", noise(2, 2)), ("a.png", MAP)])
    index = build(str(shard))
    again = ShardIndex.from_bytes(index.to_bytes(), "x")
    assert again.annotated.kind == "maps" and again.to_bytes() == index.to_bytes()
    assert again.annotated.offsets.tolist() == index.annotated.offsets.tolist()
    plain = ShardIndex.build([512], [3], [5], ["a"], size=9999)
    with np.load(io.BytesIO(plain.to_bytes())) as file:
        assert int(file["format"]) == 1 and "annotations" not in file
    wrong = index.annotated.lengths + 10**9
    bad = ShardIndex.build(
        [512],
        [3],
        [NO_LABEL],
        ["a"],
        size=9999,
        annotated=replace(index.annotated, lengths=wrong),
    )
    with pytest.raises(UserError, match="contradicts itself"):
        ShardIndex.from_bytes(bad.to_bytes(), "x")
