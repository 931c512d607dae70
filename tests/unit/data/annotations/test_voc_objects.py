"""The boxes of PASCAL VOC's XML files: which pixels they have, which are difficult, and which classes there are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from given import noise

from dattrain.cli.main import main
from dattrain.data.annotations.detection import detected
from dattrain.data.source.dataset import open_dataset
from dattrain.data.source.sample import BadSample
from dattrain.errors import UserError

OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult>{more}
<bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"""
PART = (
    "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
)


def one(name: str, box: object, difficult: int = 0, more: str = "") -> str:
    return OBJECT.format(name=name, box=box, difficult=difficult, more=more)


def voc(root: Path, objects: dict[str, list[str]], size: str = "<width>8</width><height>6</height>") -> Path:
    """A VOC folder of images of 8 x 6 pixels; returns its list, which names all but what begins with an x."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i, (name, found) in enumerate(objects.items()):
        (root / f"JPEGImages/{name}.jpg").write_bytes(noise(6, 8, i))
        text = f"<annotation><filename>{name}.jpg</filename><size>{size}</size>{''.join(found)}</annotation>"
        (root / f"Annotations/{name}.xml").write_text(text)
    path = root / "ImageSets/Main/val.txt"
    path.write_text("".join(f"{name}\n" for name in objects if name[0] != "x"))
    return path


SCENES = {
    "a": [one("person", (1, 1, 8, 6), more=PART), one("cat", (2, 3, 4.5, 3), difficult=1), one("cat", (3, 3, 2, 5))],
    "b": [],
    "x": [one("dog", (1, 1, 8, 6))],
}  # fmt: skip


def test_boxes_are_packed_as_objects_without_masks(tmp_path, capsys):
    path, out = voc(tmp_path / "VOC", SCENES), tmp_path / "out"
    assert (
        main(["data", "pack", "--voc", str(tmp_path / "VOC"), str(out), "--split", "val", "--jobs", "1"]) == 0
    )
    err = capsys.readouterr().err
    assert "1 object marked difficult, from which detection does not learn" in err
    assert (
        "1 object with a side below one pixel: training leaves" in err
        and "2 objects with a box and no mask" in err
    )
    for spec in (str(path), str(out)):
        dataset = open_dataset(spec)
        assert dataset.annotations == "instances" and dataset.maskless
        assert dataset.classes == ["background", "cat", "dog", "person"], "of the whole set, by alphabet"
        samples = {
            s.key.rpartition("-")[2].rpartition(":")[2][:1]: s for s in (dataset.read(0, i) for i in range(2))
        }
        assert [dataset.image_size(0, i) for i in range(2)] == [(6, 8)] * 2
        measured = detected(samples["a"].annotation, (6, 8), None, "", masks=False)
        # Pixels count from 1, and the last one is within.
        assert measured.boxes.tolist() == [[0, 0, 8, 6], [1, 2, 3.5, 1], [2, 2, 0, 3]]
        assert measured.classes.tolist() == [3, 1, 1] and measured.area.tolist() == [48, 3.5, 0]
        assert not measured.crowd.any() and measured.ignored == {1}
        learned = detected(samples["a"].annotation, (6, 8), None, "", masks=False, training=True)
        assert learned.boxes.tolist() == [[0, 0, 8, 6]]
        assert len(detected(samples["b"].annotation, (6, 8), None, "", masks=False)) == 0
        assert json.loads(samples["a"].annotation)["image_id"] == "a"


def test_classes_and_lists(tmp_path):
    path = voc(tmp_path, SCENES)
    assert main(["data", "pack", "--voc", str(path), str(tmp_path / "out"), "--jobs", "1"]) == 0
    assert (tmp_path / "out/_val.manifest.json").is_file(), "a list says its split"
    with pytest.raises(
        UserError, match=r"VOC folder; name .*ImageSets/Main/train.txt \(it has ImageSets/Main: val.txt\)"
    ):
        open_dataset(str(tmp_path))
    (tmp_path / "ImageSets/Main/cat_val.txt").write_text("a  1\nb -1\n")
    with pytest.raises(UserError, match=r"says of each image whether it has one class \('a  1'\)"):
        open_dataset(str(tmp_path / "ImageSets/Main/cat_val.txt"))
    (tmp_path / "class_names.txt").write_text("_background_\nperson\ncat\nbird\n")
    dataset = open_dataset(str(path))
    assert dataset.classes == ["background", "person", "cat", "bird"]
    (tmp_path / "class_names.txt").write_text("person\n")
    with pytest.raises(
        UserError, match=r"a.xml: has an object called 'cat', which .*class_names.txt \(person\)"
    ):
        open_dataset(str(path))
    stray = tmp_path / "list.txt"
    stray.write_text("a\n")
    assert main(["data", "pack", "--voc", str(stray), str(tmp_path / "b"), "--jobs", "1"]) != 0


def test_what_cannot_be_read_is_named(tmp_path):
    path = voc(tmp_path, {**SCENES, "c": [one("cat", (1, 1, 3, 3))]}, "<width>0</width>")
    assert open_dataset(str(path)).image_size(0, 0) == (0, 0)
    (tmp_path / "Annotations/b.xml").write_text("<annotation>")
    (tmp_path / "Annotations/c.xml").unlink()
    (tmp_path / "JPEGImages/c.jpg").rename(tmp_path / "JPEGImages/c.png")
    dataset = open_dataset(str(path))
    assert [flaw.partition(" images ")[2] for flaw in dataset.flaws] == [
        f"have no XML in {tmp_path}/Annotations that can be read: b, c"
    ]
    why = []
    for i in range(3):
        try:
            dataset.read(0, i)
        except BadSample as error:
            why.append(str(error).rpartition("Annotations/")[2].partition(" (")[0])
    assert sorted(why) == ["b.xml does not parse as XML", "c.xml"]
    (tmp_path / "Annotations/a.xml").write_text("<a><object><name>cat</name></object></a>")
    with pytest.raises(UserError, match=r"a.xml: its 'cat' has no bndbox"):
        open_dataset(str(path))
    for file in (tmp_path / "Annotations").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="none of its XML files has an object"):
        open_dataset(str(path))
