"""COCO's JSON as it is: ids with gaps, crowds, empty images, what is left out and what is refused."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
from given import coco, size_of, turned

from dattrain.data.annotations import rle
from dattrain.data.annotations.instances import UNLEARNED
from dattrain.data.annotations.semantic import semantic_map
from dattrain.data.source.dataset import open_dataset
from dattrain.data.source.sample import BadSample
from dattrain.errors import UserError

BOX = [0, 0, 2, 0, 2, 2, 0, 2]
RUNS = [18, 2]
CONTENT = {
    "images": [
        {"id": 30, "file_name": "a.jpg", "height": 4, "width": 5},
        {"id": 7, "file_name": "sub/b.jpg", "height": 4, "width": 5},
        {"id": 9, "file_name": "empty.jpg", "height": 6, "width": 3},
    ],
    "categories": [{"id": 90, "name": "dog", "supercategory": "animal"}, {"id": 3, "name": "cat"}],
    "annotations": [
        {"id": 1, "image_id": 30, "category_id": 90, "bbox": [0, 0, 2, 2], "area": 4.0, "iscrowd": 0, "segmentation": [BOX]},
        {"id": 2, "image_id": 30, "category_id": 3, "bbox": [4, 2, 1, 2], "area": 2.0, "iscrowd": 1,
         "segmentation": {"size": [4, 5], "counts": RUNS}},
        {"id": 3, "image_id": 7, "category_id": 3, "bbox": [0, 0, 2, 2], "area": 4, "iscrowd": 0,
         "segmentation": {"size": [4, 5], "counts": rle.to_string([0, 2, 2, 2, 14])}},
    ],
}  # fmt: skip


def changed(**more) -> dict:
    """The content with rows added to its lists."""
    content = copy.deepcopy(CONTENT)
    for name, rows in more.items():
        content[name] += rows
    return content


def box(**fields) -> dict:
    return {"id": 4, "image_id": 7, "category_id": 3, "bbox": [0, 0, 2, 2], "area": 4, **fields}


def test_a_json_that_is_not_there_is_said_to_be_so(tmp_path):
    with pytest.raises(UserError, match="No such file") as refused:
        open_dataset(f"{tmp_path}/nowhere.json")
    assert "parse" not in str(refused.value)


def test_a_json_is_opened_as_it_is(tmp_path):
    dataset = open_dataset(str(coco(tmp_path, CONTENT)))
    assert dataset.annotations == "instances"
    assert dataset.classes == ["background", "cat", "dog"], "by id, whatever their gaps"
    samples = {s.key.partition(":")[2]: s for s in (dataset.read(0, i) for i in range(3))}
    found = {
        name: semantic_map(s.annotation, size_of(s.data)[::-1], None, s.where) for name, s in samples.items()
    }
    assert found["a.jpg"].tolist() == [[2, 2, 0, 0, 0]] * 2 + [[0, 0, 0, 0, 255]] * 2
    assert found["sub/b.jpg"].tolist() == [[1, 1, 0, 0, 0]] * 2 + [[0] * 5] * 2
    assert found["empty.jpg"].tolist() == [[0] * 3] * 6
    first = json.loads(samples["a.jpg"].annotation)
    assert (first["image_id"], first["height"], first["width"]) == (30, 4, 5)
    assert first["annotations"][0]["bbox"] == [0, 0, 2, 2]
    assert first["annotations"][1] == {
        "class": 1, "bbox": [4, 2, 1, 2], "area": 2.0, "iscrowd": 1, "id": 2,
        "segmentation": {"size": [4, 5], "counts": rle.to_string(RUNS)},
    }  # fmt: skip
    assert [note.partition(": ")[2] for note in dataset.notes] == [
        "1 of its 3 images has no objects that are learned from"
    ]


def test_an_image_of_crowds_alone_is_counted_among_those_without_objects(tmp_path):
    content = changed()
    del content["annotations"][0]  # what is left of its image is a crowd
    (note,) = open_dataset(str(coco(tmp_path, content))).notes
    assert "2 of its 3 images have no objects that are learned from" in note


def test_the_images_are_found_beside(tmp_path):
    path = coco(tmp_path, CONTENT)
    (tmp_path / "train2017").rename(tmp_path / "kept")
    for folder in ("images/train2017", "images", "annotations/train2017", "annotations"):
        place = tmp_path / folder
        shutil.copytree(tmp_path / "kept", place, dirs_exist_ok=True)
        assert open_dataset(str(path)).root == place
        for image in ("a.jpg", "empty.jpg"):
            (place / image).unlink()
        shutil.rmtree(place / "sub")
    shutil.copytree(tmp_path / "kept", tmp_path / "annotations", dirs_exist_ok=True)
    (tmp_path / "annotations/a.jpg").unlink()
    dataset = open_dataset(str(path))
    assert any("1 of its 3 images are not in" in note and "a.jpg" in note for note in dataset.flaws)
    with pytest.raises(BadSample, match=r"a.jpg \(from .*train2017.json\): cannot be read"):
        [dataset.read(0, i) for i in range(3)]
    (tmp_path / "annotations/sub").rename(tmp_path / "s")
    (tmp_path / "annotations/empty.jpg").unlink()
    with pytest.raises(
        UserError, match=r"its images \(a.jpg, sub/b.jpg, empty.jpg\) are in none of .*/train2017, .*--images"
    ):
        open_dataset(str(path))


def test_degenerate_objects_are_told(tmp_path):
    content = changed(
        annotations=[
            box(id=4, area=0),
            box(id=5, area=None),
            box(id=13, area=10**400),
            box(id=10, area="4", segmentation=[BOX]),
            box(id=11, area=0, segmentation={"size": [4, 5], "counts": [20]}),
            box(id=6, bbox=[1, 1, 0.5, 3]),
            box(id=12, bbox=[3, 3, -2, -2]),
            box(id=7, bbox=[5, 0, 3, 3]),
            box(id=8, bbox=[-3, 0, 3, 3]),
            box(id=9, bbox=[-2, 0, 3, 3], segmentation=[[1, 1, 2, 2]]),
        ]
    )
    dataset = open_dataset(str(coco(tmp_path, content)))
    assert [note.partition(": ")[2] for note in dataset.notes][:-1] == [
        f"2 objects with a box beyond their image (annotation 7 of image 7): {UNLEARNED}",
        f"1 object with no area (annotation 11 of image 7): {UNLEARNED}",
        f"1 object with a side below one pixel (annotation 6 of image 7): {UNLEARNED}",
        f"1 object with a negative width or height (annotation 12 of image 7): {UNLEARNED}",
    ]
    rows = [json.loads(dataset.read(0, i).annotation) for i in range(3)]
    areas = {one["id"]: one["area"] for row in rows for one in row["annotations"]}
    assert len(areas) == 13 and [areas[i] for i in (4, 5, 10, 13)] == [0, 4, 4, 4], (
        "a number is what the file says"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(annotations=[box(image_id=8)]), r"annotation 4 is of image 8, which its images do not list"),
        (changed(annotations=[box(category_id=1)]), r"annotation 4 of image 7 has category_id 1; its categories are 3 \(cat\), 90 \(dog\)"),
        (changed(annotations=[box(category_id=[3])]), r"annotation 4 of image 7 has category_id \[3\]"),
        (changed(annotations=[box(image_id=[7])]), r"annotation 4 is of image \[7\], which"),
        (changed(annotations=[box(iscrowd="no")]), r"annotation 4 of image 7 has iscrowd 'no', neither 0 nor 1"),
        (changed(images=[{"id": 8, "file_name": "x.jpg", "height": "4", "width": 5}]), r"image 8 has height '4' and width 5; whole"),
        (changed(images=[{"id": 8.5, "file_name": "x.jpg"}]), r"image 3 has id 8.5 .* a whole number or a text"),
        ({**CONTENT, "images": [], "annotations": []}, r"has no images; its 'images' are empty"),
        ({**CONTENT, "annotations": []}, r"has no object to learn from: its 'annotations' are empty"),
        ({**CONTENT, "annotations": [box(bbox=[0.1, 0.2, 0.5, 1])]}, r"has no object to learn from: its boxes look like shares of the image's sides .one is .0.1, 0.2, 0.5, 1..; a bbox is x and y"),
        ({**CONTENT, "annotations": [box(bbox=[1, 2, 0.5, 1])]}, r"from: of its 1 object 1 has a side below one pixel"),
        ({k: v for k, v in CONTENT.items() if k != "annotations"}, r"it has images, categories; `images`, `annotations` and"),
        (changed(annotations=[box(bbox=[1, 2, 1e300, 3])]), r"annotation 4 of image 7 has the bbox \[1, 2, 1e\+300, 3\]"),
        (changed(annotations=[box(bbox=[1, 2, 10**400, 3])]), r"annotation 4 of image 7 has the bbox"),
        (changed(annotations=[box(bbox=[1, 2])]), r"annotation 4 of image 7 has the bbox \[1, 2\]"),
        (changed(annotations=[box(segmentation={"size": [4, 5], "counts": [3]})]), r"annotation 4 of image 7 has a seg.*3 pixels, for a mask of 5 x 4\); correct it"),
        (changed(images=[{"id": 7, "file_name": "x.jpg"}]), r"two of its images have the id 7"),
        (changed(images=[{"id": 8, "file_name": "a.jpg"}]), r"two of its images have the file_name 'a.jpg'"),
        (changed(images=[{"id": 8, "file_name": "../a.jpg"}]), r"image 8 has the file_name '../a.jpg'; a path below"),
        (changed(images=[{"id": 8}]), r"image 3 has id 8 and file_name None"),
        (changed(annotations=[box(id=3)]), r"two of its annotations have the id 3"),
        (changed(categories=[{"id": 3, "name": "cow"}]), r"two of its categories have the id 3"),
        (changed(categories=[{"id": 4, "name": "cat "}]), r"class 'cat ' and 'cat' differ"),
        ({"info": {}, "images": []}, r"is no COCO JSON of objects: it has info, images"),
    ],
)  # fmt: skip
def test_a_json_that_contradicts_itself_is_refused(tmp_path, content, message):
    path = coco(tmp_path, {**CONTENT, "images": CONTENT["images"]})
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        open_dataset(str(path))


def test_a_category_of_the_background_is_class_0(tmp_path):
    content = changed(categories=[{"id": 0, "name": "_background_"}], annotations=[box(category_id=0)])
    assert open_dataset(str(coco(tmp_path, content))).classes == ["background", "cat", "dog"]


def test_boxes_written_as_corners_are_told(tmp_path):
    corners = [box(id=1, bbox=[3, 1, 5, 4]), box(id=2, bbox=[0, 1, 5, 4]), box(id=3, bbox=[0, 0, 2, 2])]
    notes = open_dataset(str(coco(tmp_path, {**CONTENT, "annotations": corners}))).notes
    assert not any("x1, y1" in note for note in notes), "a pixel beyond is rounding"
    corners[1]["bbox"] = [2, 2, 5, 4]
    notes = open_dataset(str(coco(tmp_path, {**CONTENT, "annotations": corners}))).notes
    assert any(
        "of 3 boxes 2 end beyond their image, as where x1, y1, x2, y2 are written" in note for note in notes
    )


def test_whole_numbers_may_be_written_as_floats_and_flags_as_text(tmp_path):
    content = copy.deepcopy(CONTENT)
    for row in content["images"]:
        row.update({name: float(row[name]) for name in ("id", "height", "width")})
    path = coco(tmp_path, CONTENT)
    same = open_dataset(str(path)).annotation_digest
    content["annotations"][0]["iscrowd"], content["annotations"][1]["iscrowd"] = "0", "1"
    path.write_text(json.dumps(content))
    dataset = open_dataset(str(path))
    assert (
        len(dataset.notes) == 1
        and dataset.annotation_digest == same
        and (6, 3) in [dataset.image_size(0, i) for i in range(3)]
    )


def test_what_was_annotated_turned_comes_turned(tmp_path):
    content = {
        **CONTENT,
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 32, "width": 16} for i in (30, 7)],
    }
    content["annotations"] = [box(segmentation=[BOX])]
    path = coco(tmp_path, content)
    (tmp_path / "train2017/7.jpg").write_bytes(turned((32, 16), 6))
    dataset = open_dataset(str(path))
    assert {size_of(dataset.read(0, i).data) for i in range(2)} == {(16, 32)}
    (tmp_path / "train2017/7.jpg").write_bytes(turned((32, 17), 6))
    with pytest.raises(
        BadSample, match=r"annotation is for 16 x 32 pixels, and the image has 32 x 17 \(turned .* 17 x 32\)"
    ):
        [dataset.read(0, i) for i in range(2)]


def test_other_objects_are_another_set(tmp_path):
    before = open_dataset(str(coco(tmp_path / "a", CONTENT)))
    same = open_dataset(str(coco(tmp_path / "b", CONTENT)))
    after = open_dataset(str(coco(tmp_path / "c", changed(annotations=[box()]))))
    assert before.annotation_digest == same.annotation_digest != after.annotation_digest
    assert before.digest == same.digest == after.digest
    assert isinstance(before._rows.bytes, np.ndarray), "one array, which forked workers share"
