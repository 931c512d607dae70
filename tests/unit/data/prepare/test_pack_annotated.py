"""Packing sets with annotations: nothing lost, one read for both, the same bytes after a kill."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from given import ade, coco, noise, turned, voc
from PIL import Image

from dattrain.cli.main import main
from dattrain.config.schema import Config
from dattrain.data.annotations.kinds import flaws
from dattrain.data.annotations.semantic import semantic_map
from dattrain.data.decode import images
from dattrain.data.factory import assign_class_numbers
from dattrain.data.prepare.pack import PackOptions, pack
from dattrain.data.prepare.sources import open_annotated, open_source
from dattrain.data.prepare.stats import measure
from dattrain.data.prepare.verify import verify
from dattrain.data.source.build_index import build
from dattrain.data.source.dataset import ShardDataset, open_dataset
from dattrain.data.source.index import NO_LABEL, read_catalogue, read_index
from dattrain.errors import UserError


def some_maps(n: int = 5, classes: int = 3) -> dict[str, np.ndarray]:
    """Maps of an ADE-like folder, of sizes of their own."""
    random = np.random.default_rng(3)
    return {f"im_{i}": random.integers(0, classes + 1, (9 + i, 12), np.uint8) for i in range(n)}


def found_in(spec: str) -> dict[str, list[list[int]]]:
    """Map of every sample, by the stem of its key."""
    dataset = open_dataset(spec)
    found = {}
    for shard, count in enumerate(dataset.counts.tolist()):
        for i in range(count):
            sample = dataset.read(shard, i)
            height, width = images.size(sample.data)
            stem = sample.key.rpartition("-")[2].rpartition("/")[2].rpartition(":")[2].partition(".")[0]
            assert sample.label == NO_LABEL and stem not in found
            found[stem] = semantic_map(sample.annotation, (height, width), dataset.numbers, "").tolist()
    return found


def test_ade_is_packed_whole(tmp_path, capsys):
    folder = ade(tmp_path / "ADE", some_maps())
    (folder / "im_2.jpg").write_bytes(noise(11, 12, kind="PNG"))  # a PNG, whatever it is called
    out = tmp_path / "out"
    assert (
        main(["data", "pack", "--ade", str(tmp_path / "ADE"), str(out), "--per-shard", "3", "--jobs", "1"])
        == 0
    )
    assert "5 samples in 2 shards" in (said := capsys.readouterr().out) and "3 classes, maps" in said
    expected = {name: (numbers - np.uint8(1)).tolist() for name, numbers in some_maps().items()}
    assert found_in(str(out)) == expected == found_in(str(folder))
    manifest = json.loads((out / "_train.manifest.json").read_text())
    assert manifest["classes"] == ["wall", "building", "sky"] and manifest["annotations"] == "maps"
    dataset = open_dataset(str(out))
    assert (dataset.annotations, dataset.classes) == ("maps", ["wall", "building", "sky"])
    assert {entry.annotations for entry in read_catalogue(out).values()} == {"maps"}
    for path in sorted(out.glob("*.tar")):
        index = read_index(str(path))
        # What a scan of the tar finds is what packing noted.
        assert build(str(path), checksum=True).to_bytes() == index.to_bytes()
        with tarfile.open(path) as file:
            names = file.getnames()
        for i in range(len(index)):
            ends = [name.partition(".")[2] for name in names if name.startswith(index.key(i) + ".")]
            assert ends == (["png", "seg.png", "json"] if "im_2" in index.key(i) else ["jpg", "png", "json"])
            assert index.annotated.widths[i] == 12 and index.annotated.heights[i] == 9 + int(index.key(i)[-1])
    assert main(["data", "verify", str(out), "--jobs", "1"]) == 0
    assert main(["data", "ls", str(out)]) == 0 and main(["data", "ls", str(folder)]) == 0


def test_image_and_map_come_by_one_read(tmp_path):
    out = tmp_path / "out"
    source, _ = open_annotated("ade", str(ade(tmp_path / "ADE", some_maps(2))))
    pack(source, out, PackOptions())
    dataset = open_dataset(str(out))
    assert isinstance(dataset, ShardDataset)
    read, calls = dataset.source.read, []
    dataset.source.read = lambda *where: calls.append(where) or read(*where)
    sample = dataset.read(0, 1)
    index = dataset.index(0)
    assert len(calls) == 1 and sample.annotation and images.size(sample.data)
    assert calls[0][2] == index.annotated.offsets[1] + index.annotated.lengths[1] - index.offsets[1] + 512


def test_packing_resumes_with_the_same_bytes(tmp_path):
    folder = str(ade(tmp_path / "ADE", some_maps(7)))

    def packed(out: Path, jobs: int = 1) -> list[bytes]:
        pack(open_annotated("ade", folder)[0], out, PackOptions(per_shard=2), jobs=jobs)
        return [path.read_bytes() for path in sorted(out.glob("*.tar"))]

    whole = packed(tmp_path / "a")
    assert packed(tmp_path / "b", jobs=2) == whole and len(whole) == 4
    # As a kill leaves it: one shard without its tar, one without its index.
    (tmp_path / "a/train-0001.tar").unlink()
    (tmp_path / "a/train-0002.index.npz").unlink()
    assert packed(tmp_path / "a") == whole
    Image.fromarray(np.zeros((9, 12), np.uint8)).save(tmp_path / "ADE/annotations/training/im_0.png")
    with pytest.raises(UserError, match="holds the shards of another packing"):
        packed(tmp_path / "a")


COCO = {
    "images": [
        {"id": 4, "file_name": "a.jpg", "height": 6, "width": 8},
        {"id": 9, "file_name": "b.jpg", "height": 6, "width": 8},
    ],
    "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "cat"}],
    "annotations": [
        {"id": 1, "image_id": 4, "category_id": 18, "bbox": [0, 0, 2, 2], "area": 4, "iscrowd": 0,
         "segmentation": [[0, 0, 2, 0, 2, 2, 0, 2]]},
        {"id": 2, "image_id": 4, "category_id": 3, "bbox": [7, 4, 1, 2], "area": 2, "iscrowd": 1,
         "segmentation": {"size": [6, 8], "counts": [46, 2]}},
        {"id": 3, "image_id": 4, "category_id": 3, "bbox": [7, 4, 0, 2], "area": 0, "iscrowd": 0, "segmentation": []},
    ],
}  # fmt: skip


def test_coco_is_packed_whole(tmp_path, capsys):
    path = coco(tmp_path / "coco", COCO, "val2017", "instances_val2017.json")
    out = tmp_path / "out"
    assert main(["data", "pack", "--coco", str(path), str(out), "--jobs", "1"]) == 0
    said = capsys.readouterr()
    assert "val-*.tar: 2 samples" in said.out, "the split is that of its name"
    assert "1 object with a side below one pixel (annotation 3 of image 4): training leaves" in said.err
    assert "val: of cat there are crowds alone, which are void as a map" in said.err and "dog" not in said.err
    assert found_in(str(out)) == found_in(str(path)) and found_in(str(out))["b"] == [[0] * 8] * 6
    dataset = open_dataset(str(out))
    assert (dataset.annotations, dataset.classes) == ("instances", ["background", "cat", "dog"])
    shard = str(out / "val-0000.tar")
    assert build(shard, checksum=True).to_bytes() == read_index(shard).to_bytes()
    (content,) = [
        c for c in (json.loads(dataset.read(0, i).annotation) for i in range(2)) if c["annotations"]
    ]
    assert (content["image_id"], content["filename"]) == (4, "a.jpg")
    assert content["annotations"][1]["segmentation"]["counts"] == "^1" + "2", "compressed, whatever it was"
    assert json.loads((out / "_val.manifest.json").read_text())["notes"] == list(
        open_dataset(str(path)).notes
    )
    # Packed anew it is what it was; under numbers of another split they are told by name.
    pack(dataset, tmp_path / "again", PackOptions(split="val"))
    assert found_in(str(tmp_path / "again")) == found_in(str(path))


def test_images_without_objects_are_dropped_on_request(tmp_path, capsys):
    square = {"bbox": [0, 0, 2, 2], "area": 4, "category_id": 3, "iscrowd": 1}
    content = {
        "images": [
            {"id": 1, "file_name": "a.jpg", "height": 32, "width": 40},
            {"id": 2, "file_name": "none.jpg", "height": 32, "width": 40},
            {"id": 3, "file_name": "low.jpg", "height": 31, "width": 40},
            {"id": 4, "file_name": "flat.jpg", "height": 32, "width": 40},
            {"id": 5, "file_name": "unsaid.jpg"},
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}],
        "annotations": [
            *({"id": i, "image_id": i, **square} for i in (1, 3, 5)),
            {"id": 4, "image_id": 4, **square, "bbox": [0, 0, 2, 0.5]},
        ],
    }
    path = str(coco(tmp_path / "coco", content))
    args = ["data", "pack", "--coco", path]
    assert main([*args, str(tmp_path / "all"), "--jobs", "1"]) == 0
    said = capsys.readouterr()
    assert "5 samples in 1 shard" in said.out and "1 of 2 classes and the background, instances" in said.out
    assert "train: 1 of 2 classes never occur: dog" in said.err
    assert "dropped" not in json.loads((tmp_path / "all/_train.manifest.json").read_text())
    out = tmp_path / "out"
    assert main([*args, str(out), "--drop-empty", "--jobs", "1"]) == 0
    said = capsys.readouterr()
    assert "1 sample in 1 shard" in said.out
    assert "train: 2 images left out, with no objects: " in said.err
    assert "train: 2 images left out, with a shorter side below 32 pixels: " in said.err
    dropped = json.loads((out / "_train.manifest.json").read_text())["dropped"]
    reasons = {row["key"].partition(":")[2]: row["reason"] for row in dropped}
    assert reasons["none.jpg"] == reasons["flat.jpg"] == "no objects"
    assert reasons["low.jpg"] == reasons["unsaid.jpg"] == "a shorter side below 32 pixels"
    # Shards are sifted as well, and by the same.
    pack(open_dataset(str(tmp_path / "all")), tmp_path / "again", PackOptions(drop_empty=True))
    assert open_dataset(str(tmp_path / "again")).counts.tolist() == [1]
    with pytest.raises(UserError, match="drop_empty leaves nothing: each of its 1 images has no objects or"):
        only = {
            **content,
            "images": content["images"][2:3],
            "annotations": [{"id": 3, "image_id": 3, **square}],
        }
        pack(open_dataset(str(coco(tmp_path / "b", only))), tmp_path / "c", PackOptions(drop_empty=True))
    with pytest.raises(UserError, match="has maps, and --drop-empty is for sets of objects"):
        maps = open_annotated("ade", str(ade(tmp_path / "ADE", some_maps(1))))[0]
        pack(maps, tmp_path / "d", PackOptions(drop_empty=True))
    # A packing that was begun before there was the option goes on.
    settings = tmp_path / "all/.train.settings.json"
    noted = json.loads(settings.read_text())
    del noted["drop_empty"]
    settings.write_text(json.dumps(noted))
    assert main([*args, str(tmp_path / "all"), "--jobs", "1"]) == 0


def test_boxes_alone_are_packed_and_told(tmp_path, capsys):
    content = {
        **COCO,
        "annotations": [{**COCO["annotations"][0], "segmentation": []}, COCO["annotations"][1]],
    }
    path = coco(tmp_path / "coco", content)
    out = str(tmp_path / "out")
    assert main(["data", "pack", "--coco", str(path), out, "--jobs", "1"]) == 0
    err = capsys.readouterr().err
    assert (
        "1 object with a box and no mask: object 0 of instances_train2017.json:a.jpg" in err
        and "detection can learn" in err
    )
    assert main(["data", "index", f"{out}/*.tar", "--out", str(tmp_path / "links"), "--jobs", "1"]) == 0
    for spec, first in (
        (str(path), "annotation 1 of image 4"),
        (out, "object 0 of"),
        (str(tmp_path / "links"), "object 0 of"),
    ):
        dataset = open_dataset(spec)
        assert dataset.maskless.startswith(f"1 object with a box and no mask: {first}")
        assert flaws(dataset, "detection", False) == []
        for task in ("segmentation", "detection"):
            assert (
                "learns from masks; task.kind=detection with task.head retinanet"
                in flaws(dataset, task, True)[0]
            )
    assert main(["data", "verify", out, "--jobs", "1"]) == 0
    assert "1 object with a box and no mask" in capsys.readouterr().err
    assert json.loads(Path(out, "_train.manifest.json").read_text())["histogram"] == {"0": 2, "1": 1, "2": 1}


def test_splits_of_a_folder_number_classes_alike(tmp_path):
    first = coco(tmp_path / "one", COCO)
    turned_about = {**COCO, "categories": [{"id": 18, "name": "cat"}, {"id": 3, "name": "dog"}]}
    second = coco(tmp_path / "two", turned_about, "val2017", "instances_val2017.json")
    for path in (first, second):
        source, split = open_annotated("coco", str(path))
        pack(source, tmp_path / "out", PackOptions(split=split))
    train, val = (found_in(str(tmp_path / f"out/{split}-*.tar"))["a"] for split in ("train", "val"))
    assert train[0][0] == 2 and val[0][0] == 1
    assert open_dataset(str(tmp_path / "out/val-*.tar")).classes == ["background", "cat", "dog"]


def test_voc_is_packed_by_split(tmp_path, capsys):
    numbers = np.array([[0, 20, 255], [15, 0, 1]], np.uint8)
    voc(tmp_path / "VOC", {"a": numbers})
    voc(tmp_path / "VOC", {"b": numbers}, "val")
    for split, stem in (("train", "a"), ("val", "b")):
        args = [
            "data",
            "pack",
            "--voc",
            str(tmp_path / "VOC"),
            str(tmp_path / "out"),
            "--split",
            split,
            "--jobs",
            "1",
        ]
        assert main(args) == 0
        assert found_in(str(tmp_path / f"out/{split}-*.tar")) == {stem: numbers.tolist()}
    pack(open_source(str(tmp_path / "VOC/ImageSets/Segmentation/val.txt")), tmp_path / "named", PackOptions())
    assert found_in(str(tmp_path / "named")) == {"b": numbers.tolist()}
    assert main([*args[:-4], "--split", "test", "--jobs", "1"]) != 0
    assert "has no split 'test'; --split names one of train, val" in capsys.readouterr().err


def test_what_was_annotated_turned_is_packed_turned(tmp_path):
    folder = ade(tmp_path / "ADE", {"a": np.ones((32, 16), np.uint8)})
    (folder / "a.jpg").write_bytes(turned((32, 16), 6))
    pack(open_annotated("ade", str(folder))[0], tmp_path / "out", PackOptions())
    sample = open_dataset(str(tmp_path / "out")).read(0, 0)
    pixels = images.decode(sample.data)
    assert tuple(pixels.shape) == (3, 32, 16) and pixels[:, 2, 13].min() > 200


def test_bad_samples_stop_or_are_left_out_by_name(tmp_path, capsys):
    folder = ade(tmp_path / "ADE", some_maps(6))
    beside = tmp_path / "ADE/annotations/training"
    Image.fromarray(np.full((9, 12), 7, np.uint8)).save(beside / "im_0.png")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(beside / "im_1.png")
    Image.new("RGB", (12, 11)).save(beside / "im_2.png")
    (beside / "im_3.png").unlink()
    (folder / "im_4.jpg").write_bytes(noise(13, 12)[:300])
    args = ["data", "pack", "--ade", str(tmp_path / "ADE"), str(tmp_path / "out"), "--jobs", "1"]
    assert main(args) != 0
    assert "1 of 6 images have no map in" in (said := capsys.readouterr().err) and "--on-bad skip" in said
    assert not (tmp_path / "out").exists(), "what is known at the start stops it there"
    hidden = (folder / "im_3.jpg").rename(tmp_path / "im_3.jpg")
    assert main(args) != 0
    assert "remove it, or pack with --on-bad skip" in capsys.readouterr().err
    hidden.rename(folder / "im_3.jpg")
    args[4] += "-2"  # settings of one folder stay
    assert main([*args, "--on-bad", "skip"]) == 0
    lines = sorted(line for line in capsys.readouterr().err.splitlines() if line.startswith("left out"))
    assert len(lines) == 5
    for name, why in (
        (
            "annotations/training/im_0.png",
            "has 7 at x=0, y=0; by the objectInfo150.txt of its set 0 is void, and 1 to 3",
        ),
        ("images/training/im_1.jpg", "its annotation is for 5 x 5 pixels, and the image has 12 x 10"),
        ("annotations/training/im_2.png", "its map holds RGB colours"),
        ("images/training/im_3.jpg", "its map cannot be read"),
        ("images/training/im_4.jpg", ""),
    ):
        assert [line for line in lines if f"{name}: {why}" in line], (name, lines)
    assert list(found_in(str(tmp_path / "out-2"))) == ["im_5"]


def test_a_map_without_image_is_a_lost_image(tmp_path, capsys):
    folder = ade(tmp_path / "ADE", some_maps(3))
    (folder / "im_1.jpg").rename(folder / "im_1.heic")
    (folder / "readme.txt").write_text("x")
    args = ["data", "pack", "--ade", str(tmp_path / "ADE"), str(tmp_path / "out"), "--jobs", "1"]
    assert main(args) != 0
    said = capsys.readouterr().err
    for line in (
        "1 map without an image in",
        "1 image in a format that is not read: im_1.heic",
        "1 .txt file left out: readme.txt",
    ):
        assert line in said, line
    assert main(["data", "verify", str(folder), "--jobs", "1"]) == 1
    assert main([*args, "--on-bad", "skip"]) == 0
    assert set(found_in(str(tmp_path / "out"))) == {"im_0", "im_2"}
    assert "1 map without an image" in "".join(
        json.loads((tmp_path / "out/_train.manifest.json").read_text())["notes"]
    )


def test_what_the_maps_hold_is_counted_and_said(tmp_path, capsys):
    numbers = {"a": np.array([[1, 1], [0, 3]], np.uint8), "b": np.zeros((2, 2), np.uint8)}
    ade(tmp_path / "ADE", numbers)
    out = tmp_path / "out"
    args = ["data", "pack", "--ade", str(tmp_path / "ADE"), str(out), "--per-shard", "1", "--jobs", "1"]
    assert main(args) == 0
    said = capsys.readouterr()
    assert "2 samples in 2 shards" in said.out and "2 of 3 classes, maps" in said.out
    assert "train: 62.5% of the pixels are void; 1 sample holds nothing else: training:b.jpg" in said.err
    assert "train: 1 of 3 classes never occur: building" in said.err
    manifest = (out / "_train.manifest.json").read_bytes()
    assert json.loads(manifest)["histogram"] == {"0": 1, "2": 1}
    # A packing that goes on counts what it finds written, too.
    (out / "train-0001.tar").unlink()
    assert main(args) == 0 and (out / "_train.manifest.json").read_bytes() == manifest
    # Training and evaluation are told by what the manifest says.
    dataset = open_dataset(str(out))
    _, notes = assign_class_numbers(
        Config.model_validate({"model": {"num_classes": 3}}), "train", dataset, None
    )
    assert notes == [f"data.train={out}: has images of 2 of 3 classes; none of building"]
    assert found_in(str(out))["a"] == [[0, 0], [255, 2]]


def test_maps_of_nothing_but_void_are_refused(tmp_path, capsys):
    ade(tmp_path / "ADE", {name: np.zeros((2, 2), np.uint8) for name in "ab"})
    args = ["data", "pack", "--ade", str(tmp_path / "ADE"), str(tmp_path / "out"), "--jobs", "1"]
    for _ in range(2):
        assert main(args) != 0
        assert "the 2 maps for train hold no class: every pixel is void" in capsys.readouterr().err
    assert not (tmp_path / "out/_train.manifest.json").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--resize", "8"], r"has annotations, with which --resize does not go"),
        (["--dedup"], r"has annotations, with which --dedup does not go"),
        (["--label-set", "imagenet-1k"], r"with which --label-set does not go"),
        (["--images", "x"], r"--images x: goes with --coco alone"),
    ],
)
def test_options_that_would_part_images_and_annotations_are_refused(tmp_path, capsys, option, message):
    ade(tmp_path / "ADE", some_maps(1))
    assert (
        main(["data", "pack", "--ade", str(tmp_path / "ADE"), str(tmp_path / "out"), "--jobs", "1", *option])
        != 0
    )
    assert message.replace("\\", "") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_source_is_named(tmp_path, capsys):
    assert main(["data", "pack", str(tmp_path), "--ade", "x", str(tmp_path / "out")]) == 2
    assert "both SRC" in capsys.readouterr().err
    for given in ([], ["--ade", "x", "--voc", "y"]):
        with pytest.raises(SystemExit):
            main(["data", "pack", *given, str(tmp_path / "out")])
        assert "OUT" in (said := capsys.readouterr().err) or "not allowed with" in said
    # Options may stand between SRC and OUT, and before and after OUT alone.
    ade(tmp_path / "ADE", some_maps(1))
    for number, args in enumerate((["--ade", "ADE", "out"], ["out", "--ade", "ADE"])):
        places = {"ADE": str(tmp_path / "ADE"), "out": str(tmp_path / f"out{number}")}
        assert main(["data", "pack", *(places.get(arg, arg) for arg in args), "--jobs", "1"]) == 0
        assert found_in(str(tmp_path / f"out{number}"))
    assert main(["data", "pack", str(tmp_path / "out0"), "--jobs", "1", str(tmp_path / "again")]) == 0


def test_a_changed_shard_is_noticed(tmp_path):
    pack(open_annotated("ade", str(ade(tmp_path / "ADE", some_maps(1))))[0], tmp_path / "out", PackOptions())
    shard = tmp_path / "out/train-0000.tar"
    index = read_index(str(shard))
    data = bytearray(shard.read_bytes())
    data[int(index.annotated.offsets[0]) - 512] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="the tar header there is not this sample's"):
        open_dataset(str(shard)).read(0, 0)


def test_verify_and_stats(tmp_path, capsys):
    folder = ade(
        tmp_path / "ADE", {"a": np.array([[0, 1, 1], [3, 3, 3]], np.uint8), "b": np.full((2, 3), 1, np.uint8)}
    )
    pack(open_annotated("ade", str(folder))[0], tmp_path / "out", PackOptions())
    for spec in (str(folder), str(tmp_path / "out")):
        stats = measure(open_dataset(spec))
        assert stats.per_class.tolist() == [8, 0, 3] and stats.void == 1
        assert stats.images_per_class.tolist() == [2, 0, 1] and stats.unreadable == 0
    assert main(["data", "stats", str(folder), "--jobs", "1", "--out", str(tmp_path / "s.png")]) == 0
    said = capsys.readouterr().out
    assert (
        "2 of 3 present, in maps" in said and "11 in 2 images, 1 void (8.3%)" in said and "building" in said
    )
    path = coco(tmp_path / "coco", COCO)
    stats = measure(open_dataset(str(path)))
    assert (
        stats.per_class.tolist() == [0, 1, 1]
        and stats.void == 1
        and stats.images_per_class.tolist() == [0, 1, 1]
    )
    assert main(["data", "stats", str(path), "--jobs", "1"]) == 0
    assert "2 of 2 present, in instances" in capsys.readouterr().out
    assert verify(open_dataset(str(path))).good
    Image.fromarray(np.full((2, 3), 9, np.uint8)).save(tmp_path / "ADE/annotations/training/b.png")
    report = verify(open_dataset(str(folder)))
    assert [(key, "b.png: has 9 at x=0, y=0" in reason) for key, reason in report.bad] == [
        ("training:b.jpg", True)
    ]
    assert not verify(open_dataset(str(tmp_path / "out")), num_classes=2).good
