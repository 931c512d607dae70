"""A folder of one's own images: which splits it has, what is held out of it, and what is wrong with it."""

import numpy as np
import pytest
from PIL import Image

from dattrain.data import identity
from dattrain.data.prepare import own_images
from dattrain.data.source import split_file
from dattrain.data.source.dataset import FolderDataset, open_dataset
from dattrain.errors import UserError


def fill(folder, count, start=0, size=(8, 6)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        pixels = np.random.default_rng(i).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def photos(tmp_path):
    for start, (name, count) in enumerate({"cat": 30, "dog": 12, "newt": 2, "yak": 1}.items()):
        fill(tmp_path / "photos" / name, count, 100 * start)
    return tmp_path / "photos"


def test_a_tenth_of_each_class_is_held_out_by_name_and_nothing_is_on_both_sides(photos):
    own = own_images.find(photos)
    assert own.held_out and own.train_root == own.val_root == photos
    assert {name: len(files) for name, files in own.val.items()} == {"cat": 3, "dog": 1, "newt": 1}
    assert {name: len(files) for name, files in own.train.items()} == {
        "cat": 27,
        "dog": 11,
        "newt": 1,
        "yak": 1,
    }
    everything = FolderDataset(str(photos)).by_class()
    for name, files in everything.items():
        assert sorted([*own.train[name], *own.val.get(name, ())]) == files
    assert any("1 class(es) with one image stay in training" in note and "yak" in note for note in own.notes)
    assert own_images.find(photos) == own, "the same again"
    assert own_images.find(photos, seed=1).val != own.val
    assert (own.side, set(own.widths)) == (6, {8})


def test_an_image_that_is_added_moves_few(photos):
    before = own_images.find(photos).val
    fill(photos / "cat", 1, 900)
    after = own_images.find(photos).val
    assert len(set(before["cat"]) & set(after["cat"])) >= 2 and after["dog"] == before["dog"]


def test_copies_of_an_image_are_on_one_side(photos):
    for file in sorted((photos / "cat").glob("*.png")):
        (photos / "cat" / f"copy of {file.name}").write_bytes(file.read_bytes())
    own = own_images.find(photos)
    held = {file.rpartition("/")[2].removeprefix("copy of ") for file in own.val["cat"]}
    assert len(own.val["cat"]) == 6 and len(held) == 3
    assert not held & {file.rpartition("/")[2].removeprefix("copy of ") for file in own.train["cat"]}
    assert any("30 image(s) are copies of others" in note for note in own.notes)


@pytest.mark.parametrize("name", ["val", "valid", "Validation"])
def test_a_split_that_is_there_is_taken_and_a_test_set_left_alone(tmp_path, name):
    root = tmp_path / "set"
    for split, counts in {"train": (4, 3), name: (2, 0), "test": (1, 1)}.items():
        for label, count in enumerate(counts):
            if count:
                fill(root / split / "ab"[label], count)
    own = own_images.find(root)
    assert not own.held_out and own.val_root == root / name and list(own.val) == ["a"]
    assert any("has no images of 1 class(es): b" in note for note in own.notes)
    assert any(str(root / "test") in note for note in own.notes)
    fill(root / name / "c", 1)
    with pytest.raises(UserError, match=r"'c' is no class of .*train \(a, b\)"):
        own_images.find(root)


def test_without_a_validation_set_a_tenth_of_train_is_held_out_and_never_the_test_set(tmp_path):
    for split in ("train", "test"):
        for label in "ab":
            fill(tmp_path / split / label, 10)
    own = own_images.find(tmp_path)
    assert own.held_out and own.train_root == tmp_path / "train"
    assert all(len(files) == 1 for files in own.val.values())


def test_a_folder_around_it_is_looked_into(photos, tmp_path):
    outer = tmp_path / "unpacked" / "photos-v2"
    outer.parent.mkdir()
    photos.rename(outer)
    own = own_images.find(tmp_path / "unpacked")
    assert own.train_root == outer and any(str(outer) in note for note in own.notes)


def test_what_is_wrong_is_said(tmp_path, photos):
    with pytest.raises(UserError, match="no such folder"):
        own_images.find(tmp_path / "photoss")
    with pytest.raises(UserError, match="its images lie in it directly"):
        own_images.find(photos / "cat")
    fill(tmp_path / "one" / "cat", 3)
    with pytest.raises(UserError, match="one class folder"):
        own_images.find(tmp_path / "one")
    for name in "ab":
        fill(tmp_path / "single" / name, 1, ord(name))
    with pytest.raises(UserError, match="each class has one image"):
        own_images.find(tmp_path / "single")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "train-0.tar").write_bytes(b"")
    with pytest.raises(UserError, match="holds tar shards"):
        own_images.find(tmp_path / "shards")
    (photos / "dog" / "broken.png").write_bytes(b"no picture")
    found = own_images.find(photos)
    assert len(found.unreadable) == 1 and "broken.png" in found.unreadable[0]


def test_a_split_file_is_the_folder_with_these_files_alone(photos, tmp_path):
    whole = FolderDataset(str(photos))
    path = tmp_path / f"all{split_file.SUFFIX}"
    split_file.write(path, photos, whole.by_class())
    listed = open_dataset(str(path))
    assert listed.classes == whole.classes
    assert [listed.key(0, i).partition(":")[2] for i in range(45)] == [
        whole.key(0, i).partition(":")[2] for i in range(45)
    ]
    assert identity.of_dataset(listed) == identity.of_dataset(whole)
    assert listed.read(0, 3).data == whole.read(0, 3).data
    fill(photos / "cat", 1, 950)
    assert open_dataset(str(path)).counts.tolist() == [45], "more images later change nothing"
    part = tmp_path / f"part{split_file.SUFFIX}"
    split_file.write(part, photos, {"yak": ["yak/300.png"], "cat": ["cat/0.png"]})
    one = open_dataset(str(part))
    assert one.classes == ["yak", "cat"] and one.by_class() == {"yak": ["yak/300.png"], "cat": ["cat/0.png"]}


def test_a_split_file_that_is_none_or_whose_folder_is_gone_is_refused(photos, tmp_path):
    path = tmp_path / f"x{split_file.SUFFIX}"
    with pytest.raises(UserError, match="cannot be read"):
        open_dataset(str(path))
    path.write_text("[]")
    with pytest.raises(UserError, match="lists no images by class"):
        open_dataset(str(path))
    split_file.write(path, photos, {"cat": ["cat/0.png"]})
    photos.rename(tmp_path / "moved")
    with pytest.raises(UserError, match='which is not there; write where they are now as its "root"'):
        open_dataset(str(path))


def test_cocos_json_is_told_from_folders_of_classes(tmp_path):
    for name in (
        "set/instances_val.json",
        "tool/train/_annotations.coco.json",
        "coco/annotations/instances_train2017.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{}")
    for given, found in (
        ("set/instances_val.json", "set/instances_val.json"),
        ("tool", "tool/train/_annotations.coco.json"),
        ("coco", "coco/annotations/instances_train2017.json"),
    ):
        with pytest.raises(
            UserError, match=rf"{found}: looks like COCO's JSON.*data.train=\S*{found} data.val="
        ):
            own_images.find(tmp_path / given)
