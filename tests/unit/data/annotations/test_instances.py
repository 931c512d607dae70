"""Objects of an image: run lengths, polygons, and the map that they make."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dattrain.data.annotations import polygons, rle, segmentations
from dattrain.data.annotations.semantic import VOID, semantic_map
from dattrain.data.source.sample import BadSample


def test_run_lengths_by_hand():
    mask = np.array([[0, 1], [1, 1], [0, 0]], bool)  # columns 010 110
    assert rle.encode(mask).tolist() == [1, 1, 1, 2, 1]
    # The fourth is 2 - 1 and the fifth 1 - 1, each one character above 48.
    assert rle.to_string([1, 1, 1, 2, 1]) == "11110"
    assert rle.from_string("11110").tolist() == [1, 1, 1, 2, 1]
    assert (rle.decode([1, 1, 1, 2, 1], 3, 2) == mask).all()
    assert rle.encode(~mask).tolist() == [0, 1, 1, 1, 2, 1]
    # 300 is 12 + 9 * 32: 12 with more to come, 9. 10 - 300 is 30 - 10 * 32: 30 with more to come, and -10 as 22.
    assert rle.to_string([5, 300, 0, 10]) == "5" + chr(48 + 32 + 12) + "9" + "0" + chr(48 + 32 + 30) + chr(
        48 + 22
    )
    assert rle.from_string(rle.to_string([5, 300, 0, 10])).tolist() == [5, 300, 0, 10]


def test_run_lengths_of_any_mask():
    random = np.random.default_rng(0)
    for shape in ((1, 1), (7, 3), (64, 80), (200, 333)):
        for density in (0.0, 0.02, 0.5, 1.0):
            mask = random.random(shape) < density
            text = rle.to_string(rle.encode(mask))
            assert (rle.decode(rle.from_string(text), *shape) == mask).all()


@pytest.mark.parametrize("text", ["1p", "~", "1 1", "é", "o" * 12 + "0"])
def test_damaged_run_lengths_are_refused(text):
    with pytest.raises(ValueError, match="run lengths"):
        rle.from_string(text)


def filled(polygon: list[float], height: int, width: int) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    polygons.paint(mask, np.asarray(polygon, float).reshape(-1, 2))
    return mask


def test_polygons():
    mask = filled([2, 1, 6, 1, 6, 4, 2, 4], 6, 9)
    expected = np.zeros((6, 9), bool)
    expected[1:4, 2:6] = True
    assert (mask == expected).all()
    # Which way it is walked, where it begins, and corners that come twice say nothing.
    assert (filled([2, 4, 6, 4, 6, 4, 6, 1, 2, 1], 6, 9) == expected).all()
    assert filled([-5, -5, 50, -5, 50, 50, -5, 50], 6, 9).all(), "beyond the image it is cut"
    assert not filled([20, 1, 26, 1, 26, 4], 6, 9).any()
    triangle = filled([0, 0, 100, 0, 0, 100], 100, 100)
    assert abs(int(triangle.sum()) - 5000) <= 100 and triangle[0, 98] and not triangle[99, 99]


def test_polygons_and_run_lengths_are_pycocotools():
    coco = pytest.importorskip("pycocotools.mask")
    random = np.random.default_rng(1)
    for _ in range(50):
        height, width = random.integers(5, 90, 2).tolist()
        polygon = (random.random(2 * int(random.integers(3, 12))) * 100 - 5).tolist()
        theirs = coco.frPyObjects([polygon], height, width)
        ours = filled(polygon, height, width)
        assert (coco.decode(theirs)[..., 0].astype(bool) == ours).all()
        assert theirs[0]["counts"].decode() == rle.to_string(rle.encode(ours))


SQUARE = [0, 0, 2, 0, 2, 2, 0, 2]


def annotation(*objects: dict, **fields) -> bytes:
    return json.dumps({"height": 4, "width": 5, "annotations": objects, **fields}).encode()


def box(index: int, segmentation, **fields) -> dict:
    return {"class": index, "bbox": [0, 0, 2, 2], "segmentation": segmentation, **fields}


def test_objects_become_a_map():
    crowd = {"size": [4, 5], "counts": [18, 2]}  # lower half of the last column
    right = [1, 0, 4, 0, 4, 2, 1, 2]
    data = annotation(box(1, [SQUARE]), box(2, [right]), box(2, crowd, iscrowd=1))
    expected = [
        [1, VOID, 2, 2, 0],
        [1, VOID, 2, 2, 0],
        [0, 0, 0, 0, VOID],
        [0, 0, 0, 0, VOID],
    ]
    assert semantic_map(data, (4, 5), None, "w").tolist() == expected
    numbered = semantic_map(data, (4, 5), np.array([9, 3, 4]), "w")
    assert numbered.tolist() == [[{0: 9, 1: 3, 2: 4, VOID: VOID}[x] for x in row] for row in expected]
    assert semantic_map(annotation(), (4, 5), None, "w").tolist() == [[0] * 5] * 4, (
        "an empty image is background"
    )


def test_a_byte_order_mark_is_no_map():
    data = b"\xef\xbb\xbf" + annotation(box(1, [SQUARE]))
    assert semantic_map(data, (4, 5), None, "w")[0].tolist() == [1, 1, 0, 0, 0]


def test_all_forms_of_run_lengths_are_one():
    runs = rle.encode(np.arange(20).reshape(4, 5) % 3 == 0)
    text = rle.to_string(runs)
    forms = [{"size": [4, 5], "counts": counts} for counts in (runs.tolist(), text, str(text.encode()))]
    maps = [semantic_map(annotation(box(1, form)), (4, 5), None, "w").tolist() for form in forms]
    assert maps[0] == maps[1] == maps[2] and maps[0][0] == [1, 0, 0, 1, 0]
    assert all(segmentations.stored(form, "w") == {"size": [4, 5], "counts": text} for form in forms)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            annotation(box(3, [SQUARE])),
            r"w: object 0 of its annotation has class 3, but there are 3 classes .*: 0 to 2 are right",
        ),
        (annotation(box(1, None)), r"w: object 0 of its annotation has a box and no mask"),
        (annotation(box(1, {"size": [4, 4], "counts": [16]})), r"its mask has 4 x 4 pixels, its image 5 x 4"),
        (
            annotation(box(1, {"size": [4, 5], "counts": [19]})),
            r"run lengths of 19 pixels, for a mask of 5 x 4",
        ),
        (
            annotation(box(1, [[1, 2, 3]])),
            r"has the segmentation \[\[1, 2, 3\]\], neither polygons nor run lengths",
        ),
        (annotation(box("cat", [SQUARE])), r"has the class 'cat', not a number"),
        (annotation({**box(1, [SQUARE]), "bbox": [1, 2, 3]}), r"has the bbox \[1, 2, 3\]"),
        (annotation(height=5), r"its annotation has 5 x 5 pixels, its image 5 x 4"),
        (b'{"label": 3}', r"holds b'{\"label\": 3}'; objects are a list"),
        (b'{"annotations": [', r"does not parse"),
        (
            annotation(box(1, [[0, 0, 1e6, 0, 1, 1]])),
            r"has the segmentation .*, neither polygons nor run lengths",
        ),
        (annotation(box(1, [[0, 0, float("nan"), 0, 1, 1]])), r"neither polygons nor run lengths"),
        (annotation(box(1, {"size": [10**6, 10**6], "counts": [10**12]})), r"the limit is 89478485 in all"),
    ],
)
def test_annotations_that_cannot_be_used(data, message):
    with pytest.raises(BadSample, match=message):
        semantic_map(data, (4, 5), np.arange(3), "w")


def test_a_part_of_a_mask_is_that_part_of_the_whole():
    """To the pixel, for run lengths and for polygons that reach beyond the part on every side."""
    random = np.random.default_rng(0)
    for _ in range(60):
        height, width = random.integers(5, 60, 2).tolist()
        corners = random.uniform(-10, 70, (2, 2 * random.integers(3, 9))).round(2)
        drawn = [polygon.tolist() for polygon in corners]
        whole = segmentations.mask(drawn, (height, width), "")
        lengths = {"size": [height, width], "counts": rle.to_string(rle.encode(whole))}
        (top, bottom), (left, right) = (
            sorted(random.choice(side + 1, 2, replace=False).tolist()) for side in (height, width)
        )
        part = slice(top, bottom), slice(left, right)
        for segmentation in (drawn, lengths):
            assert (segmentations.mask(segmentation, (height, width), "", part) == whole[part]).all()
